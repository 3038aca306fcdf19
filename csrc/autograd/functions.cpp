#include "functions.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace refconv::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Ints = at::IntArrayRef;
using Bias = std::optional<Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// Calls an operator of the CPU backend, found once. The schemas are in refconv_kernels/schemas.py.
#define REFCONV_CALL(name, signature, ...)                                  \
  [&] {                                                                     \
    static const auto found = operator_of<signature>("refconv_cpu::" name); \
    return found.call(__VA_ARGS__);                                         \
  }()

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using RefocusWeight = Tensor(const Tensor&, const Tensor&, bool);
using RefocusWeightBackward = Tensor(const Tensor&, const Tensor&, int64_t, int64_t);
using ThinRefocusWeight = Tensor(const Tensor&, const Tensor&, const Tensor&, bool);
using ThinRefocusWeightBackward = Tensor(const Tensor&, const Tensor&);
using GroupedConv2d = Tensor(const Tensor&, const Tensor&, const Bias&, Ints, Ints, Ints);
using GroupedConv2dBackward = Three(const Tensor&, const Tensor&, const Tensor&, Ints, Ints, Ints, bool, bool, bool);
using RefConv2d = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Bias&, bool, Ints, Ints,
                                             Ints, bool);
using RefConv2dBackward = Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, Ints, Ints,
                               Ints, bool, bool, bool, bool, bool);
using ThinRefConv2d = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Bias&, bool, Ints, Ints,
                             Ints, bool);
using ThinRefConv2dBackward = Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool,
                                   Ints, Ints, Ints, bool, bool, bool, bool, bool);

// The output, and what the backward needs, as Python's Functions save it.
std::pair<Tensor, variable_list> forward(const variable_list& t, const Options& o) {
  const Bias bias = o.has_bias ? Bias(t.back()) : std::nullopt;
  switch (o.kind) {
    case Kind::kRefocusWeight:
      return {REFCONV_CALL("refocus_weight", RefocusWeight, t[0], t[1], o.identity), {t[0], t[1]}};
    case Kind::kThinRefocusWeight:
      return {REFCONV_CALL("thin_refocus_weight", ThinRefocusWeight, t[0], t[1], t[2], o.identity), {t[1], t[2]}};
    case Kind::kGroupedConv2d:
      return {REFCONV_CALL("grouped_conv2d", GroupedConv2d, t[0], t[1], bias, o.stride, o.padding, o.dilation),
              {t[0], t[1]}};
    case Kind::kRefConv2d: {
      auto [output, transformed] = REFCONV_CALL("refconv2d", RefConv2d, t[0], t[1], t[2], bias, o.identity, o.stride,
                                                o.padding, o.dilation, o.own_convolution);
      return {std::move(output), {t[0], t[1], t[2], std::move(transformed)}};
    }
    default:
      return {REFCONV_CALL("thin_refconv2d", ThinRefConv2d, t[0], t[1], t[2], t[3], bias, o.identity, o.stride,
                           o.padding, o.dilation, o.own_convolution),
              {t[0], t[1], t[2], t[3]}};
  }
}

// Gradients of the basis and of the thin form's factor are rare, and so are second derivatives.
bool goes_to_python(const Options& o, const std::vector<bool>& needs) {
  if (at::GradMode::is_enabled()) return true;
  switch (o.kind) {
    case Kind::kRefocusWeight:
      return needs[0];
    case Kind::kThinRefocusWeight:
      return needs[0] || needs[2];
    case Kind::kGroupedConv2d:
      return false;
    case Kind::kRefConv2d:
      return needs[1];
    default:
      return needs[1] || needs[3];
  }
}

// One gradient for each of `needs`; something without meaning where it is not needed.
variable_list backward(const Options& o, const Tensor& grad, const variable_list& s, const std::vector<bool>& needs) {
  switch (o.kind) {
    case Kind::kRefocusWeight:
      return {Tensor(),
              REFCONV_CALL("refocus_weight_backward", RefocusWeightBackward, grad, s[0], s[1].size(1), s[1].size(2))};
    case Kind::kThinRefocusWeight:
      return {Tensor(), REFCONV_CALL("thin_refocus_weight_backward", ThinRefocusWeightBackward, grad, s[1]), Tensor()};
    case Kind::kGroupedConv2d: {
      auto [dx, dw, db] = REFCONV_CALL("grouped_conv2d_backward", GroupedConv2dBackward, grad, s[0], s[1], o.stride,
                                       o.padding, o.dilation, needs[0], needs[1], needs[2]);
      return {std::move(dx), std::move(dw), std::move(db)};
    }
    case Kind::kRefConv2d: {
      auto [dx, dw, dr, db] =
          REFCONV_CALL("refconv2d_backward", RefConv2dBackward, grad, s[0], s[3], s[1], s[2].size(1), s[2].size(2),
                       o.stride, o.padding, o.dilation, needs[0], false, needs[2], needs[3], o.own_convolution);
      return {std::move(dx), Tensor(), std::move(dr), std::move(db)};
    }
    default: {
      auto [dx, dw, de, db] =
          REFCONV_CALL("thin_refconv2d_backward", ThinRefConv2dBackward, grad, s[0], s[1], s[2], s[3], o.identity,
                       o.stride, o.padding, o.dilation, needs[0], false, needs[2], needs[4], o.own_convolution);
      return {std::move(dx), Tensor(), std::move(de), Tensor(), std::move(db)};
    }
  }
}

// Options in a context, whose values are of PyTorch's types.
struct Held : torch::CustomClassHolder {
  explicit Held(const Options& o) : options(o) {}
  const Options options;
};

struct RefConvFunction : torch::autograd::Function<RefConvFunction> {
  static Tensor forward(AutogradContext* context, at::TensorList tensors, const Options& options) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [output, saved] = autograd::forward(tensors.vec(), options);
    context->save_for_backward(std::move(saved));
    context->saved_data["options"] = at::IValue::make_capsule(c10::make_intrusive<Held>(options));
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto held = context->saved_data["options"].toCapsule();
    const Options& options = static_cast<const Held&>(*held).options;
    constexpr size_t kTensors[] = {2, 3, 3, 4, 5};  // of each Function, the bias among them
    const size_t all = kTensors[static_cast<int64_t>(options.kind)];
    const bool may_have_bias = options.kind >= Kind::kGroupedConv2d;
    const size_t given = may_have_bias && !options.has_bias ? all - 1 : all;
    std::vector<bool> needs(all);
    for (size_t k = 0; k < given; ++k) needs[k] = context->needs_input_grad(k);
    const variable_list saved = context->get_saved_variables();
    variable_list found = goes_to_python(options, needs) ? backward_in_python(options, grads[0], saved, needs)
                                                         : autograd::backward(options, grads[0], saved, needs);
    for (size_t k = 0; k < all; ++k) {
      if (!needs[k]) found[k] = Tensor();
    }
    found.resize(given);
    found.emplace_back();  // of the options
    return found;
  }
};

}  // namespace

Tensor run(const variable_list& tensors, const Options& options) {
  return RefConvFunction::apply(at::TensorList(tensors), options);
}

}  // namespace refconv::autograd
