#include "dispatch.h"
#include "../ops.h"

// CMakeLists.txt defines SAGE_X86_ISAS where the compiler targets x86-64; elsewhere the baseline serves alone.
namespace sage::cpu {

bool isa_built(int isa) {
#if defined(SAGE_X86_ISAS)
  return isa >= 0 && isa <= 2;
#else
  return isa == 0;
#endif
}

bool isa_supported(int isa) {
#if defined(SAGE_X86_ISAS)
  if (isa == 1)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == 2)
    return isa_supported(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == 0;
}

static int best() {
  int isa = 2;
  while (!(isa_built(isa) && isa_supported(isa))) --isa;
  return isa;
}

static int chosen = best();  // the library's only state

int isa() { return chosen; }
void set_isa(int isa) { chosen = isa; }

#if defined(SAGE_X86_ISAS)
#define SAGE_DISPATCH(op, Params)                     \
  void op(const Params& params, Exec exec) {          \
    if (chosen == 2) return avx512::op(params, exec); \
    if (chosen == 1) return avx2::op(params, exec);   \
    baseline::op(params, exec);                       \
  }
#else
#define SAGE_DISPATCH(op, Params) \
  void op(const Params& params, Exec exec) { baseline::op(params, exec); }
#endif
SAGE_OPS(SAGE_DISPATCH)

}  // namespace sage::cpu
