// rms_norm (with an optional residual sum), rope, combine.

template <class M>
static void rms_norm_of(Pool& pool, const typename M::T* x, int64_t x_stride, int64_t rows, int64_t width,
                        const typename M::T* weight, float eps, typename M::T* residual, typename M::T* out) {
  auto body = [&](int64_t r) ISO_ATTR {
    const typename M::T* row = x + r * x_stride;
    if (residual != nullptr) {
      typename M::T* sum = residual + r * width;
      for (int64_t i = 0; i < width; i += W) {
        store_some<M>(sum + i, load_some<M>(sum + i, width - i) + load_some<M>(row + i, width - i), width - i);
      }
      row = sum;
    }
    vf squares = set(0.0f);
    for (int64_t i = 0; i < width; i += W) {
      const vf v = load_some<M>(row + i, width - i);
      squares = fma(v, v, squares);
    }
    const vf factor = set(1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < width; i += W) {
      const vf normalised = M::round(load_some<M>(row + i, width - i) * factor);
      store_some<M>(out + r * width + i, load_some<M>(weight + i, width - i) * normalised, width - i);
    }
  };
  parallel(pool_for(pool, single(), rows * width), rows, body);
}

static void rms_norm(Pool& pool, bool f32, const void* x, int64_t x_stride, int64_t rows, int64_t width,
                     const void* weight, float eps, void* residual, void* out) {
  if (f32) {
    rms_norm_of<F32>(pool, static_cast<const float*>(x), x_stride, rows, width, static_cast<const float*>(weight), eps,
                     static_cast<float*>(residual), static_cast<float*>(out));
  } else {
    rms_norm_of<Bf16>(pool, static_cast<const uint16_t*>(x), x_stride, rows, width,
                      static_cast<const uint16_t*>(weight), eps, static_cast<uint16_t*>(residual),
                      static_cast<uint16_t*>(out));
  }
}

ISO_INLINE float to_float(float v) { return v; }
ISO_INLINE float to_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  return __builtin_bit_cast(float, bits);
}

template <class M>
static void rope_of(Pool& pool, const typename M::T* x, int64_t x_row, int64_t x_head, int64_t rows, int64_t heads,
                    int64_t width, const float* cos, const float* sin, typename M::T* out, int64_t out_row,
                    int64_t out_head) {
  auto body = [&](int64_t t) ISO_ATTR {
    const float *c = cos + t * (width / 2), *s = sin + t * (width / 2);
    for (int64_t h = 0; h < heads; ++h) {
      const typename M::T* from = x + t * x_row + h * x_head;
      typename M::T* to = out + t * out_row + h * out_head;
      // Products and sums are rounded apart, as the reference does.
      for (int64_t begin = 0; begin < width / 2; begin += W) {
        float turned[2 * W];
        const int64_t n = least(W, width / 2 - begin);
        for (int64_t i = 0; i < n; ++i) {
          const float even = to_float(from[2 * (begin + i)]), odd = to_float(from[2 * (begin + i) + 1]);
          turned[2 * i] = even * c[begin + i] - odd * s[begin + i];
          turned[2 * i + 1] = even * s[begin + i] + odd * c[begin + i];
        }
        for (int64_t i = 0; i < 2 * n; i += W) store_some<M>(to + 2 * begin + i, load(turned + i), 2 * n - i);
      }
    }
  };
  parallel(pool_for(pool, single(), rows * heads * width), rows, body);
}

static void rope(Pool& pool, bool f32, const void* x, int64_t x_row, int64_t x_head, int64_t rows, int64_t heads,
                 int64_t width, const float* cos, const float* sin, void* out, int64_t out_row, int64_t out_head) {
  if (f32) {
    rope_of<F32>(pool, static_cast<const float*>(x), x_row, x_head, rows, heads, width, cos, sin,
                 static_cast<float*>(out), out_row, out_head);
  } else {
    rope_of<Bf16>(pool, static_cast<const uint16_t*>(x), x_row, x_head, rows, heads, width, cos, sin,
                  static_cast<uint16_t*>(out), out_row, out_head);
  }
}

template <class M>
static void combine_of(Pool& pool, const void* const* outputs, int64_t rows, int64_t width, int64_t k,
                       const float* weights, const typename M::T* own, const typename M::T* residual,
                       typename M::T* out) {
  auto body = [&](int64_t t) ISO_ATTR {
    for (int64_t i = 0; i < width; i += W) {
      vf total = set(0.0f);
      for (int64_t j = 0; j < k; ++j) {
        const auto* output = static_cast<const typename M::T*>(outputs[t * k + j]);
        const vf term = load_some<M>(output + i, width - i) * set(weights[t * k + j]);
        total = j == 0 ? term : total + term;
      }
      const int64_t at = t * width + i;
      const typename M::T* const terms[] = {own, residual};
      bool begun = k > 0;  // 0 + -0 would be +0
      for (const typename M::T* term : terms) {
        if (term == nullptr) continue;
        const vf value = load_some<M>(term + at, width - i);
        total = begun ? value + M::round(total) : value;
        begun = true;
      }
      store_some<M>(out + at, total, width - i);
    }
  };
  parallel(pool_for(pool, single(), rows * width * k), rows, body);
}

static void combine(Pool& pool, bool f32, const void* const* outputs, int64_t rows, int64_t width, int64_t k,
                    const float* weights, const void* own, const void* residual, void* out) {
  if (f32) {
    combine_of<F32>(pool, outputs, rows, width, k, weights, static_cast<const float*>(own),
                    static_cast<const float*>(residual), static_cast<float*>(out));
  } else {
    combine_of<Bf16>(pool, outputs, rows, width, k, weights, static_cast<const uint16_t*>(own),
                     static_cast<const uint16_t*>(residual), static_cast<uint16_t*>(out));
  }
}
