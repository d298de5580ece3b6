// mla_decode: absorbed attention over the paged latent cache. A work item is (row, some heads, one or all splits).

template <class M>
struct Decode {
  using T = typename M::T;
  const DecodeCall& call;
  CacheRows<M> cached{call.cache};
  int64_t latent = call.cache.latent, entry = cached.width;
  int64_t words = words_of<M>(entry), padded = ceil_div(words, W) * W;  // of a query or key
  int64_t width = ceil_div(latent, kTile) * kTile;                      // of an output row in scratch

  const int32_t* table(int64_t t) const { return call.tables + call.sequence[t] * call.table_stride; }

  // Split s of row t for heads [first, first + n): softmax state and unnormalised sums [n][width].
  void split(int64_t t, int64_t first, int64_t n, int64_t s, Softmax* state, float* sums) const {
    const int64_t begin = s * kSplit, count = least(kSplit, call.lengths[t] - begin), units = ceil_div(count, M::pack);
    auto* query = scratch_of<uint32_t>(kQuery, (n + kDotColumns) * padded);
    auto* scores = scratch_of<float>(kScores, n * kSplit);
    auto* weights = scratch_of<uint32_t>(kWeights, 2 * n * kSplit);
    auto* weight_rows = reinterpret_cast<T*>(weights + n * kSplit);
    auto* values = scratch_of<uint32_t>(kValues, kSplit * kTile);
    auto** keys = scratch_of<const T*>(kGroups, kSplit);
    for (int64_t i = 0; i < n * padded; ++i) query[i] = 0;
    for (int64_t h = 0; h < n; ++h) {
      auto* row = reinterpret_cast<T*>(query + h * padded);
      const T* q = static_cast<const T*>(call.q_latent) + t * call.latent_row + (first + h) * call.latent_head;
      const T* rope = static_cast<const T*>(call.q_rope) + t * call.rope_row + (first + h) * call.rope_head;
      __builtin_memcpy(row, q, latent * sizeof(T));
      __builtin_memcpy(row + latent, rope, call.cache.rotary * sizeof(T));
    }
    cached.find(table(t), begin, count, keys);
    score(query, n, keys, count, scores);
    const int64_t next = least(kSplit, call.lengths[t] - begin - count);
    for (int64_t h = 0; h < n; ++h)
      state[h] = softmax_split<M>(scores + h * kSplit, count, call.scale, weight_rows + h * kSplit, units * M::pack);
    pack_group<M>(static_cast<int>(n), units * M::pack, weights,
                  [&](int h) ISO_ATTR { return weight_rows + h * kSplit; });
    for (int64_t c = 0; c < latent; c += kTile) {
      // 32 columns of every value at once, so that the sums of a head stay in registers over the whole split.
      const int64_t columns = least(kTile, latent - c);
      // Meanwhile the next split's entries come in, a share with each step.
      const int64_t share = ceil_div(next, ceil_div(latent, kTile)), from = c / kTile * share;
      for (int64_t p = from; p < least(from + share, next); ++p) {
        const uint8_t* at = cached.stored(table(t), begin + count + p);
        for (int64_t i = 0; i < cached.bytes; i += 64) prefetch_second(at + i);
      }
      for (int64_t u = 0; u < units; ++u) {
        const int64_t p = u * M::pack;
        if (columns < kTile) __builtin_memset(values + u * kTile, 0, kTile * 4);
        interleave<M>(keys[p] + c, M::pack == 2 && p + 1 < count ? keys[p + 1] + c : nullptr, columns,
                      values + u * kTile);
      }
      multiply<M, Fetch::none>(values, kTile, weights, n, static_cast<int>(n), units, kTile, sums + c, width,
                               Into::zero);
    }
  }

  void score(uint32_t* query, int64_t n, const T* const* keys, int64_t count, float* scores) const {
    const bool in_place = words == padded && entry % M::pack == 0;
    const uint32_t *rows[kDotRows], *columns[kDotColumns];
    float out[kDotRows * kDotColumns];
    for (int64_t p = 0; p < count; p += kDotColumns) {
      for (int j = 0; j < kDotColumns; ++j) {
        const T* at = keys[least(p + j, count - 1)];
        columns[j] = reinterpret_cast<const uint32_t*>(at);
        if (p + kDotColumns + j < count) {
          const auto* next = reinterpret_cast<const uint32_t*>(keys[p + kDotColumns + j]);
          for (int64_t u = 0; u < words; u += 16) prefetch(next + u);
        }
        if (!in_place) {
          uint32_t* copy = query + (n + j) * padded;
          for (int64_t u = words - 1; u < padded; ++u) copy[u] = 0;
          __builtin_memcpy(copy, at, entry * sizeof(T));
          columns[j] = copy;
        }
      }
      for (int64_t h = 0; h < n; h += kDotRows) {
        for (int i = 0; i < kDotRows; ++i) rows[i] = query + least(h + i, n - 1) * padded;
        dot_block<M>(rows, columns, padded, out);
        if (h + kDotRows <= n && p + kDotColumns <= count) {
          for (int i = 0; i < kDotRows; ++i)
            __builtin_memcpy(scores + (h + i) * kSplit + p, out + i * kDotColumns, kDotColumns * sizeof(float));
          continue;
        }
        for (int64_t i = 0; i < least(kDotRows, n - h); ++i) {
          for (int64_t j = 0; j < least(kDotColumns, count - p); ++j)
            scores[(h + i) * kSplit + p + j] = out[i * kDotColumns + j];
        }
      }
    }
  }

  void finish(int64_t t, int64_t head, const Softmax& state, const float* total) const {
    T* out = static_cast<T*>(call.out) + (t * call.heads + head) * latent;
    const vf factor = set(1.0f / state.sum);
    for (int64_t c = 0; c < latent; c += W) store_some<M>(out + c, load(total + c) * factor, latent - c);
  }
};

template <class M>
static void mla_decode_of(Pool& pool, const DecodeCall& call) {
  if (call.rows == 0 || call.heads == 0) return;
  const Decode<M> decode{call};
  int64_t longest = 0;
  for (int64_t t = 0; t < call.rows; ++t) longest = most(longest, call.lengths[t]);
  const int64_t splits = ceil_div(longest, kSplit);
  // Few items: half as many heads each, and splits apart. Neither changes a result: heads are independent, and splits
  // are merged in order.
  const int64_t wanted = 4 * pool.size();
  int64_t per_item = 16;
  const bool apart = splits > 1 && call.rows * ceil_div(call.heads, per_item) < wanted;
  while (per_item > 4 && call.rows * ceil_div(call.heads, per_item) * (apart ? splits : 1) < pool.size()) per_item /= 2;
  const int64_t groups = ceil_div(call.heads, per_item), width = decode.width;
  Softmax* states = nullptr;
  float* sums = nullptr;
  if (apart) {
    states = scratch_of<Softmax>(kShared2, call.rows * call.heads * splits);
    sums = scratch_of<float>(kShared, call.rows * call.heads * splits * width);
  }
  auto body = [&](int64_t item) ISO_ATTR {
    const int64_t s = apart ? item % splits : 0, group = (apart ? item / splits : item) % groups;
    const int64_t t = (apart ? item / splits : item) / groups, first = group * per_item,
                  n = least(per_item, call.heads - first);
    const int64_t row_splits = ceil_div(call.lengths[t], kSplit);
    if (apart) {
      const int64_t at = (t * splits + s) * call.heads + first;
      if (s < row_splits) decode.split(t, first, n, s, states + at, sums + at * width);
      return;
    }
    Softmax total_state[16], state[16];
    auto* total = scratch_of<float>(kOutput, 2 * n * width);
    decode.split(t, first, n, 0, total_state, total);
    for (int64_t next = 1; next < row_splits; ++next) {
      decode.split(t, first, n, next, state, total + n * width);
      for (int64_t h = 0; h < n; ++h)
        merge_split(total_state[h], total + h * width, state[h], total + (n + h) * width, width);
    }
    for (int64_t h = 0; h < n; ++h) decode.finish(t, first + h, total_state[h], total + h * width);
  };
  parallel(pool, call.rows * groups * (apart ? splits : 1), body);
  if (!apart) return;
  auto merge = [&](int64_t item) ISO_ATTR {
    const int64_t t = item / call.heads, h = item % call.heads, first = t * splits * call.heads + h;
    for (int64_t s = 1; s < ceil_div(call.lengths[t], kSplit); ++s) {
      const int64_t at = first + s * call.heads;
      merge_split(states[first], sums + first * width, states[at], sums + at * width, width);
    }
    decode.finish(t, h, states[first], sums + first * width);
  };
  parallel(pool_for(pool, single(), call.rows * call.heads * splits * width), call.rows * call.heads, merge);
}

static void mla_decode(Pool& pool, bool f32, const DecodeCall& call) {
  if (f32) {
    mla_decode_of<F32>(pool, call);
  } else {
    mla_decode_of<Bf16>(pool, call);
  }
}
