// Passes over a vocabulary that sample.cpp chooses from. Blocks of kBlock keep the temporaries in the first cache; the
// plain loops are vectorised by the compiler.

constexpr int64_t kBlock = 64;

static void sample_forbid(float* logits, int64_t count, const uint32_t* allowed) {
  const int64_t whole = count / 32;
  for (int64_t w = 0; w < whole; ++w, logits += 32) {
    const uint32_t bits = allowed[w];
    if (bits == 0xffffffff) continue;
    for (int i = 0; i < 32; ++i) logits[i] = bits >> i & 1 ? logits[i] : -__builtin_inff();
  }
  for (int i = 0; i < count % 32; ++i) {
    if (!(allowed[whole] >> i & 1)) logits[i] = -__builtin_inff();
  }
}

static int64_t sample_argmax(const float* values, int64_t count) {
  constexpr int64_t kStep = 4 * W, kRun = 16 * kStep;
  float largest = -__builtin_inff();
  int64_t run = 0;  // where the first run begins that the largest value is in
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = least(begin + kRun, count), whole = begin + (end - begin) / kStep * kStep;
    vf top[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) top[v] = set(-__builtin_inff());
    for (int64_t i = begin; i < whole; i += kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) top[v] = larger(load(values + i + v * W), top[v]);
    }
    float here = largest_lane(larger(larger(top[0], top[1]), larger(top[2], top[3])));
    for (int64_t i = whole; i < end; ++i) here = values[i] > here ? values[i] : here;
    if (here > largest) largest = here, run = begin;
  }
  for (int64_t i = run; i < count; ++i) {
    if (values[i] == largest) return i;
  }
  return -1;  // only when every value is NaN
}

static float sample_scale(const float* logits, float temperature, float* values, int64_t count) {
  vf top = set(-__builtin_inff());
  const int64_t whole = count / W * W;
  for (int64_t i = 0; i < whole; i += W) {
    const vf value = load(logits + i) / set(temperature);
    store(values + i, value);
    top = larger(value, top);
  }
  float largest = largest_lane(top);
  for (int64_t i = whole; i < count; ++i) {
    values[i] = logits[i] / temperature;
    largest = values[i] > largest ? values[i] : largest;
  }
  return largest;
}

// exp for x <= 0 in double, about 1 ulp: x = n ln 2 + r, then a Taylor series to the 13th power (|r| <= 0.35). Below
// -700 it is zero.
ISO_INLINE double exp_double(double x) {
  const double limited = x < -700.0 ? -700.0 : x;
  const double shifted = limited * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (limited - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const int64_t exponent =
      __builtin_bit_cast(int64_t, shifted) - __builtin_bit_cast(int64_t, 6755399441055744.0) + 1023;
  return x < -700.0 ? 0.0 : p * __builtin_bit_cast(double, exponent << 52);
}

static void sample_softmax_weights(const float* values, double largest, double* weights, int64_t count) {
  for (int64_t i = 0; i < count; ++i) weights[i] = exp_double(static_cast<double>(values[i]) - largest);
}

ISO_INLINE uint64_t mix(uint64_t z) {  // splitmix64's finaliser
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static void sample_gumbel(const float* values, int64_t first, int64_t count, uint64_t key, float least_value,
                          int64_t least_id, double* best, int64_t* best_id) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  // -log(-log u) <= -log(1 - u), and log2(f) >= (bits of f as a number) / 2^23 - 127, so a few integer steps bound a
  // token's noise from above. Only tokens whose bound reaches the best value so far are worth two logarithms.
  for (int64_t begin = first; begin < first + count; begin += kBlock) {
    const int64_t n = least(kBlock, first + count - begin);
    uint64_t hash[kBlock];
    float bound[kBlock];
    const uint64_t base = key + static_cast<uint64_t>(begin) * kGolden;
    for (int64_t i = 0; i < kBlock; ++i) hash[i] = mix(base + static_cast<uint64_t>(i) * kGolden);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float complement = static_cast<float>(static_cast<int32_t>(~hash[i] >> 33));  // (1 - u) 2^31, rounded down
      bound[i] =
          (158.0f - static_cast<float>(__builtin_bit_cast(int32_t, complement)) * 0x1p-23f) * 0.69314718f + 0.001f;
    }
    const float goal = static_cast<float>(*best);
    const float slack = (goal < 0 ? -goal : goal) * 1e-6f;
    uint32_t any = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool possible = values[begin + i] >= least_value && values[begin + i] + bound[i] + slack >= goal;
      any |= possible;
      bound[i] = possible ? 1.0f : 0.0f;
    }
    if (any == 0) continue;
    for (int64_t i = 0; i < n; ++i) {
      const float value = values[begin + i];
      if (bound[i] == 0.0f || (value == least_value && begin + i > least_id)) continue;
      const double u = (static_cast<double>(hash[i] >> 11) + 0.5) * 0x1p-53;
      const double noisy = static_cast<double>(value) - __builtin_log(-__builtin_log(u));
      if (noisy > *best || (noisy == *best && begin + i < *best_id)) {
        *best = noisy;
        *best_id = begin + i;
      }
    }
  }
}
