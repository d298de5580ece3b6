// `linear` and `head_linear`: rows × packed weight.

constexpr int64_t kRowChunk = 256;  // rows that one work item handles: their sums (32 KiB) stay in the second cache
constexpr int64_t kSmallWork =
    1 << 17;  // multiply-adds (or bytes) below which waking another thread costs more than it gains

ISO_INLINE Pool& pool_for(Pool& pool, Pool& alone, int64_t work) { return work < kSmallWork ? alone : pool; }

static Pool& single() {
  static Pool pool(1);
  return pool;
}

// Tiles per work item: items big enough to stream well, and enough of them that a slow thread doesn't hold up the rest.
ISO_INLINE int64_t tiles_per_item(int64_t tiles, int64_t tile_bytes, int threads) {
  const int64_t by_size = most(1, (int64_t{256} << 10) / most(1, tile_bytes)),
                by_count = most(1, tiles / (threads * 4));
  return least(by_size, by_count);
}

// Threads that claim items in turn get neighbours, so that each reads one stream of memory: item → place among all
// items.
ISO_INLINE int64_t in_streams(int64_t item, int64_t items, int threads) {
  const int64_t each = items / threads;
  return item < each * threads ? item % threads * each + item / threads : item;
}

// Where the stream of the thread that claims item `claimed` of what comes next begins. Null: not known.
ISO_INLINE const uint8_t* begin_of(const Upcoming& then, int64_t claimed, int threads) {
  if (then.weight == nullptr) return nullptr;
  const Linear& weight = *then.weight;
  const int64_t per_item = tiles_per_item(weight.tiles, weight.tile_bytes, threads),
                items = then.by_part ? weight.parts : ceil_div(weight.tiles, per_item);
  if (claimed >= items) return nullptr;
  const int64_t item = in_streams(claimed, items, threads);
  return weight.tile(then.by_part ? weight.part_tile[item] : item * per_item);
}

// The share of an item among `items` of what is no weight, into the second cache.
ISO_INLINE void fetch_share(const Upcoming& then, int64_t item, int64_t items) {
  int64_t total = 0;
  for (int64_t s = 0; s < then.span_count; ++s) total += then.spans[s].bytes;
  int64_t begin = total * item / items, end = total * (item + 1) / items;
  for (int64_t s = 0; s < then.span_count && end > 0; ++s) {
    const Span& span = then.spans[s];
    for (int64_t i = most(begin, 0); i < least(end, span.bytes); i += 64) prefetch_second(span.at + i);
    begin -= span.bytes, end -= span.bytes;
  }
}

template <class M>
ISO_INLINE void store_tile(const Linear& weight, int64_t t, const float* sums, int64_t rows, void* out,
                           int64_t out_stride, int64_t first_row, int64_t column, bool out_f32) {
  const int width = weight.tile_width[t];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first_row + r) * out_stride + column;
    for (int o = 0; o < width; o += W) {
      vf value = load(sums + r * kTile + o);
      if (weight.bias != nullptr) value = value + load(weight.bias + t * kTile + o);
      if (M::f32 || out_f32) {
        store_some<F32>(static_cast<float*>(out) + at + o, value, width - o);
      } else {
        store_some<M>(static_cast<typename M::T*>(out) + at + o, value, width - o);
      }
    }
  }
}

// Groups of `rows` consecutive rows of x, packed where they can't be used in place, and as the weight takes them.
// `packed` holds rows × words, and as many more as a group may.
template <class M>
static TakenGroups<M> make_groups(Pool& pool, const typename M::T* x, int64_t stride, int64_t rows,
                                  const Linear& weight, Group* groups, uint32_t* packed) {
  const int64_t elements = weight.inputs, words = words_of<M>(elements) * kRowWords<M>, count = group_count(rows);
  const TakenGroups<M> taken(groups, count, rows, weight.words, takes_integers(weight));
  auto body = [&](int64_t g) ISO_ATTR {
    const int64_t first = group_begin(rows, g);
    const int n = static_cast<int>(group_begin(rows, g + 1) - first);
    const bool as_it_lies =
        kRowWords<M> == 1 && (kByRow<M> ? (n == kGroup || count == 1) && stride % M::pack == 0 : n == 1);
    if (as_it_lies && elements % M::pack == 0) {
      groups[g] =
          Group{reinterpret_cast<const uint32_t*>(x + first * stride), kByRow<M> ? stride / M::pack : 1, n, first};
      return;
    }
    groups[g] = unpacked_group<M>(packed + first * words, words, n, first);
    pack_words<M>(groups[g], 0, elements, [&](int r) ISO_ATTR { return x + (first + r) * stride; });
    if (count == 1) enlarge<M>(weight, groups[g]);
    taken.make(weight, g);
  };
  parallel(pool_for(pool, single(), rows * elements), count, body);
  return taken;
}

template <class M>
static void linear_of(Pool& pool, const Linear& weight, const typename M::T* x, int64_t x_stride, int64_t rows,
                      void* out, bool out_f32, const Upcoming& then) {
  if (rows == 0 || weight.outputs == 0) return;
  const int64_t count = group_count(rows);
  auto* groups = scratch_of<Group>(kGroups, count);
  auto* packed = scratch_of<uint32_t>(kShared, (rows + kGroup) * weight.words * kRowWords<M>);
  const auto taken = make_groups<M>(pool, x, x_stride, rows, weight, groups, packed);
  const int64_t chunk_groups = kRowChunk / kGroup, chunks = ceil_div(count, chunk_groups);
  const int64_t per_item = tiles_per_item(weight.tiles, weight.tile_bytes, pool.size()),
                items = ceil_div(weight.tiles, per_item);
  auto body = [&](int64_t claimed) ISO_ATTR {
    const int64_t item = chunks == 1 ? in_streams(claimed, items, pool.size()) : claimed;
    fetch_share(then, claimed, items * chunks);
    // Chunks of rows vary fastest, so a tile that was just read from memory is used again while it is in a cache.
    const int64_t first_group = item % chunks * chunk_groups, n = least(chunk_groups, count - first_group);
    const Group& last = groups[first_group + n - 1];
    const int64_t first_row = groups[first_group].first, n_rows = last.first + last.rows - first_row;
    auto* sums = scratch_of<float>(kAccumulator, n * kGroup * kTile);
    const int64_t begin = item / chunks * per_item, end = least(begin + per_item, weight.tiles);
    const auto registers = registers_for(groups + first_group, n);
    // A thread claims items in turn with the others, so that it most likely goes on with this one.
    const int64_t following = claimed + pool.size();
    const uint8_t* const next = chunks > 1          ? weight.tile(end)
                                : following < items ? weight.tile(in_streams(following, items, pool.size()) * per_item)
                                                    : begin_of(then, claimed % pool.size(), pool.size());
    for (int64_t t = begin; t < end; ++t) {
      multiply_tile<M>(weight, t, taken.groups() + first_group, n, sums,
                       t + 1 < end       ? weight.tile(t + 1)
                       : next == nullptr ? weight.tile(t)
                                         : next);
      store_tile<M>(weight, t, sums, n_rows, out, weight.outputs, first_row, weight.tile_column[t], out_f32);
    }
  };
  parallel(pool_for(pool, single(), rows * weight.outputs * weight.inputs), items * chunks, body);
}

static void linear(Pool& pool, bool f32, const Linear& weight, const void* x, int64_t x_stride, int64_t rows, void* out,
                   bool out_f32, Upcoming then) {
  if (f32) {
    linear_of<F32>(pool, weight, static_cast<const float*>(x), x_stride, rows, out, out_f32, then);
  } else {
    linear_of<Bf16>(pool, weight, static_cast<const uint16_t*>(x), x_stride, rows, out, out_f32, then);
  }
}

// Part h of the weight against x[:, h]; x [rows, heads, K] with strides, out [rows, outputs] with the parts side by
// side.
template <class M>
static void head_linear_of(Pool& pool, const Linear& weight, const typename M::T* x, int64_t x_row, int64_t x_head,
                           int64_t rows, void* out, const Upcoming& then) {
  if (rows == 0 || weight.outputs == 0) return;
  const int64_t chunks = ceil_div(rows, kRowChunk);
  auto body = [&](int64_t claimed) ISO_ATTR {
    const int64_t item = chunks == 1 ? in_streams(claimed, weight.parts, pool.size()) : claimed;
    fetch_share(then, claimed, weight.parts * chunks);
    const int64_t h = item / chunks, first = item % chunks * kRowChunk, n = least(kRowChunk, rows - first),
                  count = group_count(n);
    auto* groups = scratch_of<Group>(kOutput, count);
    auto* packed = scratch_of<uint32_t>(kPacked, (n + kGroup) * weight.words * kRowWords<M>);
    auto* sums = scratch_of<float>(kAccumulator, count * kGroup * kTile);
    const auto taken = make_groups<M>(single(), x + first * x_row + h * x_head, x_row, n, weight, groups, packed);
    const auto registers = registers_for(groups, count);
    const int64_t following = claimed + pool.size(), end = weight.part_tile[h + 1];
    const uint8_t* const next = chunks > 1 ? weight.tile(end)
                                : following < weight.parts
                                    ? weight.tile(weight.part_tile[in_streams(following, weight.parts, pool.size())])
                                    : begin_of(then, claimed % pool.size(), pool.size());
    for (int64_t t = weight.part_tile[h]; t < end; ++t) {
      multiply_tile<M>(weight, t, taken.groups(), count, sums,
                       t + 1 < end       ? weight.tile(t + 1)
                       : next == nullptr ? weight.tile(t)
                                         : next);
      store_tile<M>(weight, t, sums, n, out, weight.outputs, first, weight.tile_column[t], false);
    }
  };
  parallel(pool_for(pool, single(), rows * weight.outputs * weight.inputs), weight.parts * chunks, body);
}

static void head_linear(Pool& pool, bool f32, const Linear& weight, const void* x, int64_t x_row, int64_t x_head,
                        int64_t rows, void* out, Upcoming then) {
  if (f32) {
    head_linear_of<F32>(pool, weight, static_cast<const float*>(x), x_row, x_head, rows, out, then);
  } else {
    head_linear_of<Bf16>(pool, weight, static_cast<const uint16_t*>(x), x_row, x_head, rows, out, then);
  }
}
