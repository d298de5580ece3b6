// Scales of the groups of inputs that integers have (grouped.cpp).

// Of one byte (narrow_scale), with the least exponent where float32 has it.
ISO_INLINE vf load_narrow_scales(const uint8_t* p, int32_t exponent) {
  const vi code = load_signed_bytes(p);
  return (vf)((((code & 0x7f) << 19) + exponent) | (code & static_cast<int32_t>(0x80000000u)));
}

// Vector v of the scales of a block of integers.
ISO_INLINE vf load_scales(const Grouping& grouping, const uint8_t* scales, int v) {
  if (grouping.scale_bytes == 1)
    return load_narrow_scales(scales + v * W, static_cast<int32_t>(grouping.exponent << 23));
  return grouping.scale_bytes == 4 ? load(reinterpret_cast<const float*>(scales) + v * W)
                                   : load_bf16_vector(reinterpret_cast<const uint16_t*>(scales) + v * W);
}
