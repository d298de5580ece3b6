// The kernels for AMX beside AVX512-BF16: those of avx512_bf16, but that products of bfloat16 rows with weights, and in
// prefill with keys and values, have another order of sums (amx.h).
#include "api.h"
#include "fp8_table.h"
#include "integer_table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ISO_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2"
#define ISO_ATTR __attribute__((target(ISO_TARGET)))
#define ISO_NAME amx
#define ISO_LABEL "amx_bf16"
#define ISO_W 16
#define ISO_AMX 1
#define ISO_SIMD "simd_avx512.h"
#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2"))), \
    apply_to = function)
#include "kernels.inc"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,bmi2,prefer-vector-width=512")
#include "kernels.inc"
#pragma GCC pop_options
#endif

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
