// The gate: float32 scores by row products, then group-limited top-k (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

// Marks the `count` largest of values[0 .. n), equal ones by lower index.
ISO_INLINE void mark_largest(const float* values, int64_t n, int64_t count, bool* marked) {
  for (int64_t i = 0; i < n; ++i) marked[i] = false;
  for (int64_t c = 0; c < count; ++c) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (!marked[i] && (best < 0 || values[i] > values[best])) best = i;
    }
    if (best >= 0) marked[best] = true;
  }
}

static void choose_experts(const RouteCall& call, const float* scores, float* biased, bool* marked, int32_t* ids,
                           float* weights) {
  const int64_t experts = call.experts, groups = call.n_group, size = experts / groups;
  for (int64_t e = 0; e < experts; ++e) biased[e] = scores[e] + call.bias[e];
  if (call.topk_group < groups) {
    float* group_score = biased + experts;
    for (int64_t g = 0; g < groups; ++g) {
      float first = -__builtin_inff(), second = -__builtin_inff();
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        const float v = biased[e];
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {
          second = v;
        }
      }
      group_score[g] = size > 1 ? first + second : first;
    }
    mark_largest(group_score, groups, call.topk_group, marked);
    for (int64_t e = 0; e < experts; ++e) biased[e] = marked[e / size] ? biased[e] : -__builtin_inff();
  }
  mark_largest(biased, experts, call.top_k, marked);
  float sum = 0.0f;
  for (int64_t e = 0, j = 0; e < experts; ++e) {
    if (!marked[e]) continue;
    ids[j] = static_cast<int32_t>(e);
    weights[j++] = scores[e];
    sum += scores[e];
  }
  for (int j = 0; j < call.top_k; ++j)
    weights[j] = (call.normalise ? weights[j] / (sum + 1e-20f) : weights[j]) * call.scaling;
}

ISO_INLINE vf load_wide(const float* p) { return load(p); }
ISO_INLINE vf load_wide(const uint16_t* p) { return load_bf16_vector(p); }

constexpr int64_t kRouteRows = 8;

// scores[row][expert] of rows [first, first + n), n <= kRouteRows, and experts [begin, end), a multiple of kDotColumns.
template <class M, class Weight>
static void score_experts(const RouteCall& call, int64_t first, int64_t n, int64_t begin, int64_t end, float* scores,
                          int64_t stride) {
  const int64_t hidden = call.hidden, width = ceil_div(hidden, W) * W;
  const auto* x = static_cast<const typename M::T*>(call.x);
  const auto* weights = static_cast<const Weight*>(call.weight);
  // Rows widened to float32 and padded with zeros; one further zero row stands in for what is missing.
  auto* wide = scratch_of<float>(kQuery, (kRouteRows + 1 + kDotColumns) * width);
  const float* zeros = wide + kRouteRows * width;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t i = 0; i < width; i += W)
      store(wide + r * width + i, load_some<M>(x + (first + r) * call.x_stride + i, hidden - i));
  }
  for (int64_t i = 0; i < width; i += W) store(wide + kRouteRows * width + i, set(0.0f));
  const uint32_t* rows[kDotRows];
  float out[kDotRows * kDotColumns];
  for (int64_t e = begin; e < end; e += kDotColumns) {
    const Weight* columns[kDotColumns];
    for (int j = 0; j < kDotColumns; ++j) {
      columns[j] = e + j < call.experts ? weights + (e + j) * hidden : reinterpret_cast<const Weight*>(zeros);
      if (width != hidden && e + j < call.experts) {
        auto* padded = reinterpret_cast<Weight*>(wide + (kRouteRows + 1 + j) * width);
        __builtin_memset(padded + hidden, 0, static_cast<size_t>(width - hidden) * sizeof(Weight));
        __builtin_memcpy(padded, columns[j], static_cast<size_t>(hidden) * sizeof(Weight));
        columns[j] = padded;
      }
    }
    const auto column = [&](int j, int64_t u) ISO_ATTR { return (vi)load_wide(columns[j] + u); };
    for (int64_t r = 0; r < n; r += kDotRows) {
      for (int i = 0; i < kDotRows; ++i)
        rows[i] = reinterpret_cast<const uint32_t*>(r + i < n ? wide + (r + i) * width : zeros);
      if (n == 1) {
        dot_columns<F32, 1>(rows, column, width, out);
      } else {
        dot_columns<F32, kDotRows>(rows, column, width, out);
      }
      for (int64_t i = 0; i < least(kDotRows, n - r); ++i) {
        for (int j = 0; j < kDotColumns; ++j) scores[(first + r + i) * stride + e + j] = out[i * kDotColumns + j];
      }
    }
  }
}

template <class M>
static void route_of(Pool& pool, const RouteCall& call) {
  const int64_t experts = ceil_div(call.experts, kDotColumns) * kDotColumns;
  // Scores of all rows first, cut over (rows, experts), so that one row is spread over the threads too.
  auto* scores = scratch_of<float>(kShared, call.rows * experts);
  const int64_t row_items = ceil_div(call.rows, kRouteRows);
  const int64_t per_item = call.rows >= 4 * kRouteRows ? experts : ceil_div(experts, 4 * kDotColumns) * kDotColumns;
  const int64_t expert_items = ceil_div(experts, per_item);
  auto gate = [&](int64_t item) ISO_ATTR {
    const int64_t first = item / expert_items * kRouteRows, n = least(kRouteRows, call.rows - first);
    const int64_t begin = item % expert_items * per_item, end = least(begin + per_item, experts);
    if (call.narrow != 0) {
      score_experts<M, uint16_t>(call, first, n, begin, end, scores, experts);
    } else {
      score_experts<M, float>(call, first, n, begin, end, scores, experts);
    }
  };
  // One row's products are little beside the reading of the weights.
  parallel(pool_for(pool, single(), most(call.rows, 4) * call.hidden * experts), row_items * expert_items, gate);

  auto pick = [&](int64_t t) ISO_ATTR {
    float* row = scores + t * experts;
    for (int64_t e = 0; e < experts; e += W) {
      float padded[W] = {};
      const auto bytes = static_cast<size_t>(least(W, experts - e)) * sizeof(float);
      __builtin_memcpy(padded, row + e, bytes);
      store(padded, sigmoid_v(load(padded)));
      __builtin_memcpy(row + e, padded, bytes);
    }
    auto* biased = scratch_of<float>(kScores, call.experts + call.n_group);
    auto* marked = scratch_of<bool>(kWeights, call.experts + call.n_group);
    choose_experts(call, row, biased, marked, call.ids + t * call.top_k, call.weights + t * call.top_k);
  };
  parallel(pool_for(pool, single(), call.rows * experts * 64), call.rows, pick);
}

static void route(Pool& pool, bool f32, const RouteCall& call) {
  if (f32) {
    route_of<F32>(pool, call);
  } else {
    route_of<Bf16>(pool, call);
  }
}
