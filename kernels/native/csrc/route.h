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

template <class M>
static void route_of(Pool& pool, const RouteCall& call) {
  constexpr int64_t kRows = 8;
  const int64_t width = ceil_div(call.hidden, W) * W, experts = ceil_div(call.experts, kDotColumns) * kDotColumns;
  // Scores of all rows first, cut over (rows, experts), so that one row is spread over the threads too.
  auto* scores = scratch_of<float>(kShared, call.rows * experts);
  const int64_t row_items = ceil_div(call.rows, kRows);
  const int64_t per_item = call.rows >= 4 * kRows ? experts : ceil_div(experts, 4 * kDotColumns) * kDotColumns;
  const int64_t expert_items = ceil_div(experts, per_item);
  const auto* x = static_cast<const typename M::T*>(call.x);
  auto gate = [&](int64_t item) ISO_ATTR {
    const int64_t first = item / expert_items * kRows, n = least(kRows, call.rows - first);
    const int64_t begin = item % expert_items * per_item, end = least(begin + per_item, experts);
    // Rows widened to float32 and padded with zeros; one further zero row stands in for what is missing.
    auto* wide = scratch_of<float>(kQuery, (kRows + 1 + kDotColumns) * width);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t i = 0; i < width; i += W)
        store(wide + r * width + i, load_some<M>(x + (first + r) * call.x_stride + i, call.hidden - i));
    }
    for (int64_t i = 0; i < width; i += W) store(wide + kRows * width + i, set(0.0f));
    const uint32_t* columns[kDotColumns];
    const uint32_t* rows[kDotRows];
    float out[kDotRows * kDotColumns];
    for (int64_t e = begin; e < end; e += kDotColumns) {
      for (int j = 0; j < kDotColumns; ++j) {
        const float* weight = e + j < call.experts ? call.weight + (e + j) * call.hidden : wide + kRows * width;
        if (width != call.hidden && e + j < call.experts) {
          float* padded = wide + (kRows + 1 + j) * width;
          for (int64_t i = 0; i < width; i += W) store(padded + i, load_some<F32>(weight + i, call.hidden - i));
          weight = padded;
        }
        columns[j] = reinterpret_cast<const uint32_t*>(weight);
      }
      for (int64_t r = 0; r < n; r += kDotRows) {
        for (int i = 0; i < kDotRows; ++i)
          rows[i] = reinterpret_cast<const uint32_t*>(wide + least(r + i, kRows) * width);
        for (int i = 0; i < kDotRows; ++i) {
          if (r + i >= n) rows[i] = reinterpret_cast<const uint32_t*>(wide + kRows * width);
        }
        dot_block<F32>(rows, columns, width, out);
        for (int64_t i = 0; i < least(kDotRows, n - r); ++i) {
          for (int j = 0; j < kDotColumns; ++j) scores[(first + r + i) * experts + e + j] = out[i * kDotColumns + j];
        }
      }
    }
  };
  // One row's products are little beside the reading of the weights.
  parallel(pool_for(pool, single(), most(call.rows, 4) * call.hidden * experts), row_items * expert_items, gate);

  auto pick = [&](int64_t t) ISO_ATTR {
    float* row = scores + t * experts;
    for (int64_t e = 0; e < experts; e += kDotColumns) {
      float padded[W] = {};
      for (int j = 0; j < kDotColumns; ++j) padded[j] = row[e + j];
      store(padded, sigmoid_v(load(padded)));
      for (int j = 0; j < kDotColumns; ++j) row[e + j] = padded[j];
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
