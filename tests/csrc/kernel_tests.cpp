// Every CPU kernel, on every instruction set of this machine. Exit status 0 when all agree.
#include "checks.h"

int main() {
  test_choice_for_weights();
  for (const auto* set : refconv::cpu::instruction_sets()) {
    generator.seed(0);  // the same data for each, whichever others there are
    test_convolutions(*set);
    test_channels_last(*set);
    test_weights(*set);
    test_optimizer(*set);
    std::printf("%s: done\n", set->name);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
