// The 256 e4m3fn codes as bfloat16, which holds each exactly.
#pragma once

#include <cstdint>

namespace iso {

struct Fp8Table {
  uint16_t value[256];
  uint8_t low[128], high[128];  // bytes of the non-negative half

  constexpr Fp8Table() : value{}, low{}, high{} {
    for (int code = 0; code < 256; ++code) {
      const int magnitude = code & 0x7f;
      int bits = (magnitude << 4) + (120 << 7);
      if (magnitude == 0x7f) {
        bits = 0x7fc0;
      } else if (magnitude == 0) {
        bits = 0;
      } else if (magnitude < 8) {  // m × 2^-9, normalised
        const int top = magnitude >= 4 ? 2 : magnitude >= 2 ? 1 : 0;
        bits = (127 - 9 + top) << 7 | (magnitude << (7 - top) & 0x7f);
      }
      value[code] = static_cast<uint16_t>(bits | (code & 0x80) << 8);
      if (code < 128) {
        low[code] = static_cast<uint8_t>(bits & 0xff);
        high[code] = static_cast<uint8_t>(bits >> 8);
      }
    }
  }
};

constexpr Fp8Table kFp8Table{};

}  // namespace iso
