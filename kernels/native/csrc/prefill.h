// mla_prefill: expanded causal attention. Heads are taken in rounds: as many as keep all threads at work, more only
// where their expanded keys and values are small. Each round first expands (key chunk × heads), then attends (head ×
// query block).

template <class M>
struct Prefill {
  using T = typename M::T;
  static constexpr int64_t kKeyChunk = 96, kQueryBlock = 96;  // multiples of kTile
  const PrefillCall& call;
  CacheRows<M> cached{call.cache};
  int64_t rotary = call.cache.rotary;
  int64_t length = call.start + call.rows;
  int64_t positions = ceil_div(length, kKeyChunk) * kKeyChunk;
  int64_t width = call.nope + call.value,
          key_width = call.nope + rotary;  // elements of an expanded latent, of a key
  int64_t key_words = words_of<M>(key_width), value_tiles = ceil_div(call.value, kTile);
  int64_t units = positions / M::pack;  // words of a value along positions
  int64_t head_keys = positions * key_words, head_values = value_tiles * units * kTile;  // words of one head

  // Positions [begin, begin + kKeyChunk) of heads [first, first + n) → packed keys [32 positions][word] and values [32
  // outputs][unit].
  void expand(int64_t begin, int64_t first, int64_t n, uint32_t* keys, uint32_t* values) const {
    const Linear& weight = *call.kv_b;
    const int64_t rows = least(kKeyChunk, length - begin), count = group_count(rows);
    Group groups[(kKeyChunk + kGroup - 1) / kGroup];
    auto* packed = scratch_of<uint32_t>(kPacked, kKeyChunk * weight.words * kRowWords<M>);
    const T* entries[kKeyChunk];
    cached.find(call.table, begin, rows, entries);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t at = group_begin(rows, g);
      const int size = static_cast<int>(group_begin(rows, g + 1) - at);
      groups[g] = unpacked_group<M>(packed + at * weight.words * kRowWords<M>, weight.words, size, at);
      pack_words<M>(groups[g], 0, weight.inputs, [&](int r) ISO_ATTR { return entries[at + r]; });
    }
    auto* sums = scratch_of<float>(kAccumulator, kKeyChunk * kTile);
    auto* expanded = scratch_of<T>(kExpanded, kKeyChunk * (width + key_width));
    T* key_rows = expanded + kKeyChunk * width;
    // Positions past the end are zero; the others are written in full for every head.
    for (int64_t i = rows * width; i < kKeyChunk * width; ++i) expanded[i] = 0;
    for (int64_t i = rows * key_width; i < kKeyChunk * key_width; ++i) key_rows[i] = 0;
    const auto registers = registers_for(groups, count);
    const TakenGroups<M> taken(groups, count, rows, weight.words, takes_integers(weight));
    for (int64_t g = 0; g < count; ++g) taken.make(weight, g);
    for (int64_t h = 0; h < n; ++h) {
      const int64_t column = (first + h) * width;
      for (int64_t t = column / kTile; t * kTile < column + width; ++t) {
        multiply_tile<M>(weight, t, taken.groups(), count, sums, weight.tile(t + 1));
        const int64_t low = most(column, t * kTile), high = least(column + width, (t + 1) * kTile);
        for (int64_t r = 0; r < rows; ++r) {
          T rounded[kTile];
          for (int o = 0; o < kTile; o += W) {
            vf value = load(sums + r * kTile + o);
            if (weight.bias != nullptr) value = value + load(weight.bias + t * kTile + o);
            M::store(rounded + o, value);
          }
          __builtin_memcpy(expanded + r * width + low - column, rounded + low - t * kTile, (high - low) * sizeof(T));
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        __builtin_memcpy(key_rows + r * key_width, expanded + r * width, call.nope * sizeof(T));
        __builtin_memcpy(key_rows + r * key_width + call.nope, entries[r] + weight.inputs, rotary * sizeof(T));
      }
      for (int64_t tile = 0; tile < kKeyChunk; tile += kTile) {
        pack_group<M, 1>(kTile, key_width, keys + h * head_keys + (begin + tile) * key_words,
                         [&](int r) ISO_ATTR { return key_rows + (tile + r) * key_width; });
      }
      for (int64_t v = 0; v < value_tiles; ++v) {
        const int64_t columns = least(kTile, call.value - v * kTile);
        uint32_t* out = values + h * head_values + (v * units + begin / M::pack) * kTile;
        for (int64_t p = 0; p < kKeyChunk; p += M::pack) {
          const T* row = expanded + p * width + call.nope + v * kTile;
          uint32_t* to = out + p / M::pack * kTile;
          if (columns < kTile) __builtin_memset(to, 0, kTile * 4);
          interleave<M>(row, M::pack == 2 ? row + width : nullptr, columns, to);
        }
      }
    }
  }

  // Query rows [first, first + n) of one head.
  void attend(int64_t head, int64_t first, int64_t n, const uint32_t* keys, const uint32_t* values) const {
    const int64_t out_width = value_tiles * kTile, count = group_count(n);
    auto* query = scratch_of<uint32_t>(kQuery, kQueryBlock * key_words * kRowWords<M>);
    auto* scores = scratch_of<float>(kScores, kGroup * kSplit);
    auto* weights = scratch_of<uint32_t>(kWeights, 2 * kGroup * kSplit);
    auto* weight_rows = reinterpret_cast<T*>(weights + kGroup * kSplit);
    auto* total = scratch_of<float>(kOutput, (kQueryBlock + kGroup) * out_width);
    float* sums = total + kQueryBlock * out_width;
    Softmax state[kQueryBlock], part[kGroup];
    Group queries[(kQueryBlock + kGroup - 1) / kGroup];
    const T* q = static_cast<const T*>(call.q) + first * call.q_row + head * call.q_head;
    for (int64_t g = 0; g < count; ++g) {
      const int64_t at = group_begin(n, g);
      const int rows = static_cast<int>(group_begin(n, g + 1) - at);
      queries[g] = unpacked_group<M>(query + at * key_words * kRowWords<M>, key_words, rows, at);
      pack_words<M>(queries[g], 0, key_width, [&](int r) ISO_ATTR { return q + (at + r) * call.q_row; });
    }
    const TileRegisters registers(kGroup);
    for (int64_t begin = 0; begin < call.start + first + n; begin += kSplit) {
      for (int64_t g = 0; g < count; ++g) {
        const int64_t at = queries[g].first, position = call.start + first + at;
        const int rows = queries[g].rows;
        const int64_t seen = least(kSplit, position + rows - begin);  // by the group's last row
        if (seen <= 0) continue;
        // Where kByRow, whole steps, which take less time than the words that are left of one.
        const int64_t words = ceil_div(kByRow<M> ? ceil_div(seen, kTile) * kTile : seen, M::pack);
        for (int64_t p = 0; p < seen; p += kTile)
          multiply_group<M>(keys + (begin + p) * key_words, queries[g], key_words, scores + p, kSplit);
        // A position after the row's own has weight exactly 0, so it changes nothing in the sums.
        for (int r = 0; r < rows; ++r) {
          const int64_t own = most(0, least(kSplit, position + r + 1 - begin));
          part[r] = softmax_split<M>(scores + r * kSplit, own, call.scale, weight_rows + r * kSplit, words * M::pack);
        }
        Group weighing = unpacked_group<M>(weights, kSplit / M::pack, rows, 0);
        if constexpr (kByRow<M>) {
          weighing.words = reinterpret_cast<const uint32_t*>(weight_rows);
        } else {
          pack_words<M>(weighing, 0, words * M::pack, [&](int r) ISO_ATTR { return weight_rows + r * kSplit; });
        }
        for (int64_t v = 0; v < value_tiles; ++v) {
          multiply_group<M>(values + (v * units + begin / M::pack) * kTile, weighing, words,
                            (begin == 0 ? total + at * out_width : sums) + v * kTile, out_width);
        }
        for (int r = 0; r < rows; ++r) {
          if (begin == 0) {
            state[at + r] = part[r];
          } else if (position + r >= begin) {
            merge_split(state[at + r], total + (at + r) * out_width, part[r], sums + r * out_width, out_width);
          }
        }
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      T* out = static_cast<T*>(call.out) + ((first + r) * call.heads + head) * call.value;
      const vf factor = set(1.0f / state[r].sum);
      for (int64_t c = 0; c < call.value; c += W)
        store_some<M>(out + c, load(total + r * out_width + c) * factor, call.value - c);
    }
  }
};

template <class M>
static void mla_prefill_of(Pool& pool, const PrefillCall& call) {
  if (call.rows == 0 || call.heads == 0) return;
  constexpr int64_t kRoundBytes = int64_t{64} << 20, kHeads = 4;
  const Prefill<M> prefill{call};
  const int64_t head_words = prefill.head_keys + prefill.head_values;
  const int64_t blocks = ceil_div(call.rows, prefill.kQueryBlock);
  const int64_t busy = ceil_div(ceil_div(2 * pool.size(), blocks), kHeads) * kHeads;  // two items for each thread
  const int64_t per_round =
      least(call.heads, most(least(busy, most(kHeads, pool.size())), kRoundBytes / (head_words * 4)));
  auto* keys = scratch_of<uint32_t>(kShared, per_round * head_words);
  uint32_t* values = keys + per_round * prefill.head_keys;
  for (int64_t head = 0; head < call.heads; head += per_round) {
    const int64_t heads = least(per_round, call.heads - head), head_groups = ceil_div(heads, kHeads);
    auto expand = [&](int64_t item) ISO_ATTR {
      const int64_t first = item % head_groups * kHeads, n = least(kHeads, heads - first);
      prefill.expand(item / head_groups * prefill.kKeyChunk, head + first, n, keys + first * prefill.head_keys,
                     values + first * prefill.head_values);
    };
    parallel(pool, prefill.positions / prefill.kKeyChunk * head_groups, expand);
    auto attend = [&](int64_t item) ISO_ATTR {
      const int64_t block = blocks - 1 - item / heads, h = item % heads,
                    first = block * prefill.kQueryBlock;  // the longest first
      prefill.attend(head + h, first, least(prefill.kQueryBlock, call.rows - first), keys + h * prefill.head_keys,
                     values + h * prefill.head_values);
    };
    parallel(pool, blocks * heads, attend);
  }
}

static void mla_prefill(Pool& pool, bool f32, const PrefillCall& call) {
  if (f32) {
    mla_prefill_of<F32>(pool, call);
  } else {
    mla_prefill_of<Bf16>(pool, call);
  }
}
