// Routed experts (and, as one expert, dense and shared MLPs): down(SiLU(gate x) × up x), all active experts in two
// rounds of work items.
//
// Pairs are packed once, per expert, in groups. The first round leaves the rounded intermediate in that same packed
// order, so the second round reads it as it lies.

// SiLU(gate) × up of one tile for one group → words of the packed intermediate. `rows` apart, word by word.
template <class M>
ISO_INLINE void store_hidden(const Linear& gate_up, int64_t gate_tile, int64_t up_tile, const float* gate,
                             const float* up, const Group& group, int64_t tile, int64_t inner) {
  constexpr int64_t kWords = kTile / M::pack;
  const int64_t elements = least(kTile, inner - tile * kTile);
  alignas(64) typename M::T rows[kGroup * kTile];
  for (int r = 0; r < group.rows; ++r) {
    for (int o = 0; o < kTile; o += W) {
      vf g = load(gate + r * kTile + o), u = load(up + r * kTile + o);
      if (gate_up.bias != nullptr) {
        g = g + load(gate_up.bias + gate_tile * kTile + o);
        u = u + load(gate_up.bias + up_tile * kTile + o);
      }
      M::store(rows + r * kTile + o, swiglu_v(g, u));
    }
  }
  pack_words<M>(group, tile * kWords, elements, [&](int r) ISO_ATTR { return rows + r * kTile; });
}

template <class M>
static void experts_of(Pool& pool, const ExpertsCall& call) {
  if (call.pairs == 0) return;
  const int64_t in_words = words_of<M>(call.hidden) * kRowWords<M>,
                hidden_words = words_of<M>(call.inner) * kRowWords<M>;
  int64_t total = 0;
  for (int64_t a = 0; a < call.active; ++a) total += group_count(call.offsets[a + 1] - call.offsets[a]);
  auto* groups = scratch_of<Group>(kGroups, 2 * total);
  auto* begin = scratch_of<int64_t>(kShared2, call.active + 1 + total);
  auto* packed = scratch_of<uint32_t>(kShared, (call.pairs + kGroup) * in_words);
  auto* hidden = scratch_of<uint32_t>(kHidden, (call.pairs + kGroup) * hidden_words);
  Group *in = groups, *middle = groups + total;

  const auto* x = static_cast<const typename M::T*>(call.x);
  int64_t* expert_of = begin + call.active + 1;  // of a group
  bool integers[2] = {};
  begin[0] = 0;
  for (int64_t a = 0; a < call.active; ++a) {
    const int64_t first = call.offsets[a], rows = call.offsets[a + 1] - first, count = group_count(rows);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t at = first + group_begin(rows, g);
      const int n = static_cast<int>(first + group_begin(rows, g + 1) - at);
      in[begin[a] + g] = unpacked_group<M>(packed + at * in_words, in_words, n, at);
      middle[begin[a] + g] = unpacked_group<M>(hidden + at * hidden_words, hidden_words, n, at);
      expert_of[begin[a] + g] = a;
    }
    integers[0] |= takes_integers(*call.gate_up[a]), integers[1] |= takes_integers(*call.down[a]);
    begin[a + 1] = begin[a] + count;
  }
  const auto row_of = [&](int64_t pair)
                          ISO_ATTR { return x + (call.rows == nullptr ? pair : call.rows[pair]) * call.x_stride; };
  const TakenGroups<M> taken_in(in, total, call.pairs, words_of<M>(call.hidden), integers[0]);
  auto pack = [&](int64_t g) ISO_ATTR {
    Group& group = in[g];
    // Of one row only where each is its expert's only one.
    const bool as_it_lies = kRowWords<M> == 1 && (kByRow<M> ? call.pairs == total : group.rows == 1);
    if (as_it_lies && call.hidden % M::pack == 0) {
      group = Group{reinterpret_cast<const uint32_t*>(row_of(group.first)), 1, 1, group.first};
      return;
    }
    pack_words<M>(group, 0, call.hidden, [&](int r) ISO_ATTR { return row_of(group.first + r); });
    const int64_t a = expert_of[g];
    if (begin[a + 1] - begin[a] == 1) enlarge<M>(*call.gate_up[a], group);
    taken_in.make(*call.gate_up[a], g);
  };
  parallel(pool_for(pool, single(), kRowWords<M> == 1 && call.pairs == total ? 0 : call.pairs * call.hidden), total,
           pack);

  // Groups of one expert in chunks, so that the sums of a chunk stay in cache.
  constexpr int64_t kChunk = kRowChunk / kGroup;
  const int64_t inner_tiles = ceil_div(call.inner, kTile), out_tiles = ceil_div(call.hidden, kTile);
  Pool& workers = pool_for(pool, single(), call.pairs * call.hidden * call.inner);
  // An item is a run of tiles, each of which passes over all groups of its expert. Runs of one size keep the threads in
  // turn, and so each in its own stream (in_streams), as long as that does not halve them.
  const auto run_of = [&](int64_t tiles, size_t tile_bytes) ISO_ATTR {
    const int64_t longest =
        most(1, least(tiles, tiles_per_item(tiles * call.active, static_cast<int64_t>(tile_bytes), pool.size())));
    int64_t even = longest;
    while (tiles % even != 0) --even;
    return 2 * even < longest ? longest : even;
  };
  const int64_t gate_run = run_of(inner_tiles, call.active == 0 ? 0 : 2 * call.gate_up[0]->tile_bytes),
                gate_runs = ceil_div(inner_tiles, gate_run);
  const int threads =
      total == call.active ? pool.size() : 1;  // with many rows it is arithmetic that takes the time, not memory
  const int64_t down_run = run_of(out_tiles, call.active == 0 ? 0 : call.down[0]->tile_bytes),
                down_runs = ceil_div(out_tiles, down_run);
  // The first tile of what a thread reads after an item of a round: most likely that of the item which it claims next.
  const auto down_after = [&](int64_t claimed) ISO_ATTR {
    const int64_t items = call.active * down_runs;
    if (claimed >= items) return begin_of(call.then, claimed % threads, threads);
    const int64_t item = in_streams(claimed, items, threads);
    return call.down[item / down_runs]->tile(item % down_runs * down_run);
  };
  const auto gate_after = [&](int64_t claimed) ISO_ATTR {
    const int64_t items = call.active * gate_runs, item = in_streams(claimed, items, threads);
    return claimed >= items ? nullptr : call.gate_up[item / gate_runs]->tile(item % gate_runs * gate_run);
  };
  auto first_round = [&](int64_t claimed) ISO_ATTR {
    const int64_t item = in_streams(claimed, call.active * gate_runs, threads), a = item / gate_runs,
                  first_tile = item % gate_runs * gate_run, end = least(first_tile + gate_run, inner_tiles);
    const Linear& weight = *call.gate_up[a];
    const Group* taken = taken_in.groups() + begin[a];
    for (int64_t tile = first_tile; tile < end; ++tile) {
      const uint8_t* next = tile + 1 < end ? weight.tile(tile + 1) : gate_after(claimed + threads);
      const uint8_t* next_up = next == nullptr ? nullptr : next + static_cast<size_t>(inner_tiles) * weight.tile_bytes;
      if (next == nullptr) {
        next = down_after(claimed % threads);
        if (next == nullptr) next = weight.tile(tile);  // which is at hand
        next_up = next + kPrefetchWords * 4;
      }
      for (int64_t g = begin[a]; g < begin[a + 1]; g += kChunk) {
        const int64_t n = least(kChunk, begin[a + 1] - g);
        auto* gate = scratch_of<float>(kAccumulator, n * kGroup * kTile);
        auto* up = scratch_of<float>(kAccumulator2, n * kGroup * kTile);
        const auto registers = registers_for(in + g, n);
        const Strip both[] = {{tile, gate, next}, {inner_tiles + tile, up, next_up}};
        if (!multiply_two(weight, both, taken + (g - begin[a]), n)) {
          multiply_tile<M>(weight, tile, taken + (g - begin[a]), n, gate, weight.tile(inner_tiles + tile));
          multiply_tile<M>(weight, inner_tiles + tile, taken + (g - begin[a]), n, up, next);
        }
        for (int64_t i = 0; i < n; ++i) {
          const int64_t offset = (in[g + i].first - in[g].first) * kTile;
          store_hidden<M>(weight, tile, inner_tiles + tile, gate + offset, up + offset, middle[g + i], tile,
                          call.inner);
        }
      }
    }
  };
  parallel(workers, call.active * gate_runs, first_round);

  const TakenGroups<M> taken_middle(middle, total, call.pairs, words_of<M>(call.inner), integers[1]);
  auto make = [&](int64_t g) ISO_ATTR { taken_middle.make(*call.down[expert_of[g]], g); };
  if (taken_middle.made()) parallel(pool_for(pool, single(), call.pairs * call.inner), total, make);

  auto second_round = [&](int64_t claimed) ISO_ATTR {
    const int64_t item = in_streams(claimed, call.active * down_runs, threads), a = item / down_runs,
                  first_tile = item % down_runs * down_run, end = least(first_tile + down_run, out_tiles);
    const Linear& weight = *call.down[a];
    const Group* taken = taken_middle.groups() + begin[a];
    for (int64_t tile = first_tile; tile < end; ++tile) {
      const uint8_t* next = tile + 1 < end ? weight.tile(tile + 1) : down_after(claimed + threads);
      if (next == nullptr) next = weight.tile(tile);  // which is at hand
      for (int64_t g = begin[a]; g < begin[a + 1]; g += kChunk) {
        const int64_t n = least(kChunk, begin[a + 1] - g);
        auto* sums = scratch_of<float>(kAccumulator, n * kGroup * kTile);
        const auto registers = registers_for(middle + g, n);
        multiply_tile<M>(weight, tile, taken + (g - begin[a]), n, sums, next);
        const Group& last = middle[g + n - 1];
        store_tile<M>(weight, tile, sums, last.first + last.rows - middle[g].first, call.out, call.hidden,
                      middle[g].first, tile * kTile, false);
      }
    }
  };
  parallel(workers, call.active * down_runs, second_round);
}

static void experts(Pool& pool, bool f32, const ExpertsCall& call) {
  if (f32) {
    experts_of<F32>(pool, call);
  } else {
    experts_of<Bf16>(pool, call);
  }
}
