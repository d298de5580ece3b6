// Small integers as bfloat16, which holds each exactly: by their magnitudes, and by the codes of int4 and int6.
#pragma once

#include <cstdint>

namespace iso {

constexpr uint16_t integer_bf16(int value) {
  const int magnitude = value < 0 ? -value : value;
  int top = 0;
  while (magnitude >> (top + 1) != 0) ++top;
  const int bits = magnitude == 0 ? 0 : (127 + top) << 7 | (magnitude << (7 - top) & 0x7f);
  return static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

template <int kSize>
struct IntegerBytes {
  uint8_t low[kSize], high[kSize];
  constexpr void set(int place, int value) {
    low[place] = static_cast<uint8_t>(integer_bf16(value) & 0xff);
    high[place] = static_cast<uint8_t>(integer_bf16(value) >> 8);
  }
};

struct IntegerTable {
  IntegerBytes<128> magnitude;  // 0 .. 127
  IntegerBytes<64> six;         // -32 .. 31: an int6 code less 32
  IntegerBytes<16> code;        // -8 .. 7: an int4 code less 8
  uint16_t code_twice[32];      // the same by five bits, of which the first says nothing
  uint16_t difference[32];      // 0 .. 15, -16 .. -1: a difference of two codes, in five bits

  constexpr IntegerTable() : magnitude{}, six{}, code{}, code_twice{}, difference{} {
    for (int i = 0; i < 128; ++i) magnitude.set(i, i);
    for (int i = 0; i < 64; ++i) six.set(i, i - 32);
    for (int i = 0; i < 16; ++i) code.set(i, i - 8);
    for (int i = 0; i < 32; ++i) code_twice[i] = integer_bf16(i % 16 - 8);
    for (int i = 0; i < 32; ++i) difference[i] = integer_bf16(i < 16 ? i : i - 32);
  }
};

constexpr IntegerTable kIntegers{};

}  // namespace iso
