// The kernels for AMX beside AVX512-BF16: those of avx512_bf16, but that products of bfloat16 rows with weights, and in
// prefill with keys and values, have another order of sums (amx.h).
#include "api.h"
#include "fp8_table.h"
#include "integer_table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ISO_NAME amx
#define ISO_LABEL "amx_bf16"
#define ISO_AMX 1
#include "kernels_avx512.inc"

namespace iso {
namespace {

// Linux lets a process use tile registers that has asked for it (Documentation/arch/x86/xstate.rst).
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool machine_has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0;
}

}  // namespace

const Ops* amx_ops() {
  static const bool here = avx512_ops() != nullptr && machine_has_tiles() && tiles_permitted();
  return here ? amx::ops() : nullptr;
}
}  // namespace iso
#else
namespace iso {
const Ops* amx_ops() { return nullptr; }
}  // namespace iso
#endif
