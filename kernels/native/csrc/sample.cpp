// Sampling: which tokens top-k and top-p leave, without sorting the vocabulary, then the largest of value + Gumbel
// noise among them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"

namespace iso {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr int kBins = 1024;
constexpr float kBinsPerNat = 32.0f;

uint64_t mix(uint64_t z) {  // splitmix64's finaliser
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

uint64_t noise_key(int64_t seed, int64_t index) {
  return mix(mix(static_cast<uint64_t>(seed) + kGolden) + kGolden * (static_cast<uint64_t>(index) + 1));
}

// Bin of a value by its distance below the largest: a token in a lower bin is always the likelier one.
int bin_of(float largest, float value) {
  const float distance = (largest - value) * kBinsPerNat;
  return distance < static_cast<float>(kBins - 1) ? static_cast<int>(distance)
                                                  : kBins - 1;  // NaN (from infinities) goes last too
}

struct Row {
  const Ops& ops;
  const float* values;
  int64_t vocab;
  float largest;

  // Most likely first. NaN comes last, for an order must know where everything goes.
  std::vector<int64_t> sorted(std::vector<int64_t> ids) const {
    const auto rank = [&](int64_t id) { return values[id] == values[id] ? values[id] : -INFINITY; };
    std::sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) {
      const float left = rank(a), right = rank(b);
      return left != right ? left > right : a < b;
    });
    return ids;
  }

  std::vector<int64_t> in_bins(int first, int last) const {
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < vocab; ++i) {
      const int bin = bin_of(largest, values[i]);
      if (bin >= first && bin <= last) ids.push_back(i);
    }
    return ids;
  }

  // The k most likely tokens, most likely first.
  std::vector<int64_t> top_k(int64_t k) const {
    std::vector<int64_t> count(kBins, 0);
    for (int64_t i = 0; i < vocab; ++i) ++count[static_cast<size_t>(bin_of(largest, values[i]))];
    int bin = 0;
    for (int64_t seen = count[0]; seen < k && bin < kBins - 1; seen += count[static_cast<size_t>(bin)]) ++bin;
    std::vector<int64_t> ids = sorted(in_bins(0, bin));
    ids.resize(static_cast<size_t>(std::min<int64_t>(k, static_cast<int64_t>(ids.size()))));
    return ids;
  }

  // How many of `ids`, most likely first, it takes to reach `goal` of weight, starting from `before`. At least one.
  template <class Weight>
  static size_t reach(const std::vector<int64_t>& ids, double before, double goal, Weight weight) {
    for (size_t i = 0; i < ids.size(); ++i) {
      before += weight(ids[i]);
      if (before >= goal) return i + 1;
    }
    return ids.size();
  }

  // The least likely token of the smallest set that reaches p.
  int64_t top_p_last(double p) const {
    auto* weights = scratch_of<double>(kWeights, static_cast<size_t>(vocab));
    ops.sample.softmax_weights(values, static_cast<double>(largest), weights, vocab);
    std::vector<double> sum(kBins, 0.0);
    for (int64_t i = 0; i < vocab; ++i) sum[static_cast<size_t>(bin_of(largest, values[i]))] += weights[i];
    double total = 0.0, before = 0.0;
    for (double s : sum) total += s;
    int bin = 0;
    while (bin < kBins - 1 && before + sum[static_cast<size_t>(bin)] < p * total)
      before += sum[static_cast<size_t>(bin++)];
    std::vector<int64_t> ids = sorted(in_bins(bin, bin));
    // Rounding at the very end: the last bin that holds anything. The largest value is in the first.
    while (ids.empty() && bin > 0) {
      --bin;
      ids = sorted(in_bins(bin, bin));
    }
    if (ids.empty()) return -1;
    return ids[reach(ids, before, p * total, [&](int64_t id) { return weights[id]; }) - 1];
  }
};

int64_t sample_row(const Ops& ops, const SampleCall& call, int64_t t) {
  const float* logits = call.logits + t * call.stride;
  if (!(call.temperature[t] > 0)) return ops.sample.argmax(logits, call.vocab);
  auto* values = scratch_of<float>(kScores, static_cast<size_t>(call.vocab));
  const float largest = ops.sample.scale(logits, static_cast<float>(call.temperature[t]), values, call.vocab);
  // An infinite logit wins, and where all are NaN nothing can be drawn.
  if (!std::isfinite(largest)) return ops.sample.argmax(logits, call.vocab);
  const Row row{ops, values, call.vocab, largest};
  const uint64_t key = noise_key(call.seed[t], call.index[t]);
  const int64_t top = ops.sample.argmax(values, call.vocab);
  double best = -INFINITY;
  int64_t best_id = top;
  const double p = call.top_p[t];
  if (call.top_k[t] > 0) {
    std::vector<int64_t> ids = row.top_k(std::min(call.top_k[t], call.vocab));
    if (p < 1.0) {
      const auto weight = [&](int64_t id) {
        return std::exp(static_cast<double>(values[id]) - static_cast<double>(largest));
      };
      double total = 0.0;
      for (int64_t id : ids) total += weight(id);
      ids.resize(Row::reach(ids, 0.0, p * total, weight));
    }
    for (int64_t id : ids) ops.sample.gumbel(values, id, 1, key, -INFINITY, call.vocab, &best, &best_id);
    return best_id;
  }
  const int64_t last = p < 1.0 ? row.top_p_last(p) : -1;
  const float least = last < 0 ? -INFINITY : values[last];
  // The most likely token first: it sets a goal that few others can reach.
  ops.sample.gumbel(values, top, 1, key, least, last < 0 ? call.vocab : last, &best, &best_id);
  ops.sample.gumbel(values, 0, call.vocab, key, least, last < 0 ? call.vocab : last, &best, &best_id);
  return best_id;
}

}  // namespace

void sample(Pool& pool, const Ops& ops, const SampleCall& call) {
  auto body = [&](int64_t t) { call.out[t] = sample_row(ops, call, t); };
  parallel(pool, call.rows, body);
}

}  // namespace iso
