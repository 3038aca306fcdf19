// The module refconv_kernels._autograd: calls by number, of problems that were checked and chosen before.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <unordered_map>

#include "functions.h"

namespace refconv::autograd {
namespace {

// A call as Python gives it: (number, tensors, identity), and for a convolution (stride, padding, dilation, groups,
// padding_mode) besides. Tensors that are not there, which only the last one may be, are None.
struct Call {
  Options options{};
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> problem;  // all that the choice of a kernel depends on
  std::optional<at::ScalarType> autocast;
};

constexpr Py_ssize_t kWeightArguments = 3, kConvolutionArguments = 8;
constexpr size_t kMostKnown = 4096;

struct Hash {
  size_t operator()(const std::vector<int64_t>& numbers) const {
    uint64_t hash = 14695981039346656037u;
    for (const int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 1099511628211u;
    return hash ^ hash >> 32;
  }
};

// Problems, and whether the convolution is ours. Guarded by Python's lock.
std::unordered_map<std::vector<int64_t>, bool, Hash>& known() {
  static auto* problems = new std::unordered_map<std::vector<int64_t>, bool, Hash>;
  return *problems;
}

// backward_in_python() calls it; never released, as Python may be gone by then.
PyObject* python_backward = nullptr;

bool read_number(PyObject* object, int64_t& number) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// One number for both, or two of them.
bool read_pair(PyObject* object, std::array<int64_t, 2>& pair, std::vector<int64_t>& problem) {
  if (PyTuple_CheckExact(object) || PyList_CheckExact(object)) {
    if (PySequence_Fast_GET_SIZE(object) != 2) return false;
    for (size_t k = 0; k < 2; ++k) {
      if (!read_number(PySequence_Fast_GET_ITEM(object, static_cast<Py_ssize_t>(k)), pair[k])) return false;
    }
  } else {
    if (!read_number(object, pair[0])) return false;
    pair[1] = pair[0];
  }
  problem.insert(problem.end(), pair.begin(), pair.end());
  return true;
}

// As a pair, or by name where that means as many zeros before as behind. Stride, dilation and tensors are known by
// then.
bool read_padding(PyObject* object, Call& call) {
  if (!PyUnicode_CheckExact(object)) return read_pair(object, call.options.padding, call.problem);
  const Options& o = call.options;
  if (PyUnicode_CompareWithASCIIString(object, "same") == 0) {
    if (call.tensors.size() < 2) return false;
    const at::Tensor& weight = call.tensors[1];
    if (o.stride != std::array<int64_t, 2>{1, 1} || weight.dim() != 4) return false;
    for (size_t k = 0; k < 2; ++k) {
      int64_t zeros = 0;
      const int64_t between = weight.size(static_cast<int64_t>(k) + 2) - 1;
      if (__builtin_mul_overflow(o.dilation[k], between, &zeros) || zeros % 2 != 0) return false;
      call.options.padding[k] = zeros / 2;
    }
  } else if (PyUnicode_CompareWithASCIIString(object, "valid") != 0) {
    return false;
  }
  call.problem.insert(call.problem.end(), o.padding.begin(), o.padding.end());
  return true;
}

bool read_tensor(PyObject* object, Call& call) {
  if (!THPVariable_CheckExact(object)) return false;  // a parameter counts as exact, other subclasses do not
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.is_neg() || tensor.is_conj()) return false;
  if (tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
  call.problem.push_back(static_cast<int64_t>(tensor.scalar_type()) << 8 | tensor.dim());
  for (const int64_t size : tensor.sizes()) call.problem.push_back(size);
  for (const int64_t stride : tensor.strides()) call.problem.push_back(stride);
  call.tensors.push_back(tensor);
  return true;
}

// Whether nothing is going on that wants to see these calls, or changes what they are.
bool is_plain() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) && !included.has(c10::DispatchKey::Tracer);
}

// What autocast makes of the tensors of a call, as autocast.py and its callers do: the input of a layer, all of a
// convolution. A transformation is none of its business.
void cast(Call& call) {
  if (!call.autocast) return;
  const size_t count = call.options.kind == Kind::kGroupedConv2d ? call.tensors.size() : 1;
  for (size_t k = 0; k < count; ++k) {
    at::Tensor& tensor = call.tensors[k];
    const at::ScalarType type = tensor.scalar_type();
    if (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) tensor = tensor.to(*call.autocast);
  }
}

// False for a call that only Python knows how to make.
bool read(PyObject* const* arguments, Py_ssize_t count, Call& call) {
  if (count < kWeightArguments || !PyLong_CheckExact(arguments[0]) || !PyTuple_CheckExact(arguments[1])) return false;
  const int64_t number = PyLong_AsLongLong(arguments[0]);
  if (number < 0 || number >= static_cast<int64_t>(Kind::kCount)) return false;
  call.options.kind = static_cast<Kind>(number);
  const bool convolves = call.options.kind >= Kind::kGroupedConv2d;
  if (count < (convolves ? kConvolutionArguments : kWeightArguments) || !PyBool_Check(arguments[2])) return false;
  call.options.identity = arguments[2] == Py_True;
  call.problem.reserve(64);
  call.problem.push_back(number);
  if (convolves && at::autocast::is_autocast_enabled(at::kCPU)) {
    call.autocast = at::autocast::get_autocast_dtype(at::kCPU);
    call.problem.push_back(-1 - static_cast<int64_t>(*call.autocast));  // no number of a tensor is negative
  }
  const Py_ssize_t tensors = PyTuple_GET_SIZE(arguments[1]);
  for (Py_ssize_t k = 0; k < tensors; ++k) {
    PyObject* tensor = PyTuple_GET_ITEM(arguments[1], k);
    if (convolves && k == tensors - 1) {
      if (tensor == Py_None) break;
      call.options.has_bias = true;
    }
    if (!read_tensor(tensor, call)) return false;
  }
  if (!convolves) return true;
  if (!read_pair(arguments[3], call.options.stride, call.problem) ||
      !read_pair(arguments[5], call.options.dilation, call.problem) || !read_padding(arguments[4], call)) {
    return false;
  }
  if (!PyLong_CheckExact(arguments[6]) || !PyUnicode_CheckExact(arguments[7])) return false;
  call.problem.push_back(PyLong_AsLongLong(arguments[6]));
  return PyUnicode_CompareWithASCIIString(arguments[7], "zeros") == 0;
}

// The output; None where Python has to make the call.
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (!is_plain() || !read(arguments, count, call)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const auto found = known().find(call.problem);
  if (found == known().end()) Py_RETURN_NONE;
  call.options.own_convolution = found->second;
  at::Tensor output;
  {
    const pybind11::gil_scoped_release without_lock;
    cast(call);
    output = run(call.tensors, call.options);
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

// remember(own_convolution, *arguments of call): from now on call() makes such calls.
PyObject* remember(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (count > 0 && is_plain() && read(arguments + 1, count - 1, call)) {
    if (known().size() >= kMostKnown) known().clear();
    known()[std::move(call.problem)] = arguments[0] == Py_True;
  }
  PyErr_Clear();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL,
     "call(function, tensors, identity, stride, padding, dilation, groups, padding_mode): the output of a problem that "
     "was remembered, None for any other."},
    {"remember", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&remember)), METH_FASTCALL,
     "remember(own_convolution, *arguments of call)."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

std::vector<at::Tensor> backward_in_python(const Options& options, const at::Tensor& grad,
                                           const std::vector<at::Tensor>& saved, const std::vector<bool>& needs) {
  namespace py = pybind11;
  const py::gil_scoped_acquire lock;
  const auto wrap = [](const at::Tensor& tensor) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  };
  py::list tensors, needed;
  for (const at::Tensor& tensor : saved) tensors.append(wrap(tensor));
  for (const bool need : needs) needed.append(need);
  const auto pair = [](const std::array<int64_t, 2>& numbers) { return py::make_tuple(numbers[0], numbers[1]); };
  const py::tuple geometry = py::make_tuple(pair(options.stride), pair(options.padding), pair(options.dilation));
  const py::tuple given = py::reinterpret_borrow<py::object>(python_backward)(
      static_cast<int64_t>(options.kind), wrap(grad), tensors, py::tuple(needed), geometry, options.identity,
      options.own_convolution);
  std::vector<at::Tensor> found(needs.size());
  for (size_t k = 0; k < found.size(); ++k) {
    if (!given[k].is_none()) found[k] = THPVariable_Unpack(py::object(given[k]).ptr());
  }
  return found;
}

}  // namespace refconv::autograd

PYBIND11_MODULE(_autograd, m) {
  m.doc() = "The autograd Functions of refconv_kernels in C++.";
  PyModule_AddFunctions(m.ptr(), refconv::autograd::methods);
  m.def(
      "set_backward",
      [](const pybind11::object& function) {
        refconv::autograd::python_backward = pybind11::object(function).release().ptr();
      },
      pybind11::arg("function"),
      "function(number, grad, saved tensors, needs, geometry, identity, own_convolution) computes the gradients that "
      "only Python's Functions know.");
}
