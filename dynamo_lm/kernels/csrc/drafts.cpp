// Drafts, one row's at a time: drawing a chain of them from the masked conditionals, and the exact rejection rule that verifies
// them.
//
// As in sampler.cpp pointers come from arrays, and the caller checks their types and sizes. The same is computed without C++ by
// `sampling.draft_from` and `verification._Dense`.

namespace {

// The row of the n-gram that continues a row of the level before; -1 if there is none.
int64_t child(const Level& level, int64_t row, int64_t token) {
  if (row >= level.parents) return -1;  // a token that the table does not know
  const int32_t *begin = level.tokens + level.offsets[row], *end = level.tokens + level.offsets[row + 1];
  const int32_t* const found = std::lower_bound(begin, end, token);
  return found < end && *found == token ? found - level.tokens : -1;
}

// q of k candidates after the `length` tokens before `end`; false if the table has none of them there.
bool weighted(
    const Level* levels, const int64_t* end, int64_t length, const int64_t* ids, const double* probs, int64_t k, double alpha_c,
    double* q) {
  int64_t row = *(end - length);
  for (int64_t i = 1; i < length && row >= 0; i++) row = child(levels[i], row, end[i - length]);
  if (row < 0) return false;
  const Level& level = levels[length];
  double most = -INFINITY, total = 0;
  for (int64_t i = 0; i < k; i++) {
    const int64_t found = child(level, row, ids[i]);
    q[i] = -INFINITY;
    if (found >= 0) q[i] = std::log(probs[i]) + alpha_c * (level.logs[found] - std::max<double>(levels->logs[ids[i]], -1e30));
    most = std::max(most, q[i]);
  }
  if (!(most > -INFINITY)) return false;
  for (int64_t i = 0; i < k; i++) total += q[i] = q[i] == -INFINITY ? 0.0 : std::exp(q[i] - most);
  for (int64_t i = 0; i < k; i++) q[i] /= total;
  return true;
}

// The slot of the largest, of equal ones the first.
int64_t largest(const double* q, int64_t k) {
  const double enough = *std::max_element(q, q + k) * (1 - ROUNDING);
  const int64_t slot = std::find_if(q, q + k, [&](double value) { return value >= enough; }) - q;
  return slot < k ? slot : 0;
}

// Inverse CDF of weights, (k,).
int64_t drawn_from(const double* q, int64_t k, double uniform) {
  double total = 0, below = 0;
  for (int64_t i = 0; i < k; i++) total += q[i];
  int64_t last = 0;  // for a product that rounds up to the total
  for (int64_t i = 0; i < k; i++) {
    below += q[i];
    if (below > uniform * total) return i;
    if (q[i] != 0) last = i;
  }
  return last;
}

typedef double Doubles __attribute__((vector_size(32)));

constexpr int64_t SPAN = 512;  // logits whose weights are summed up together, so that few of them are computed again

// e^(x - most): the same for one logit as for eight.
inline double weight(float logit, float most) { return exponential(Lanes{} + (logit - most))[0]; }

// What the base samples from: each of `size` logits has a weight. Sums are float64: nothing is lost of large vocabularies.
struct Line {
  const float* logits;
  int64_t size;
  float most;
  std::vector<double> sums;  // by block
  double total = 0;

  Line(const float* logits, int64_t size) : logits(logits), size(size), most(peak(logits, size)) {
    for (int64_t begin = 0; begin < size; begin += SPAN) {
      const int64_t end = std::min(size, begin + SPAN);
      Doubles sum{};
      int64_t i = begin;
      for (; i + 8 <= end; i += 8) {
        const Lanes weights = exponential(load(logits + i) - most);
        FourLanes halves[2];  // the lower four and the upper four
        std::memcpy(halves, &weights, sizeof weights);
        sum += __builtin_convertvector(halves[0], Doubles);
        sum += __builtin_convertvector(halves[1], Doubles);
      }
      double all = sum[0] + sum[1] + sum[2] + sum[3];
      for (; i < end; i++) all += weight(logits[i], most);
      sums.push_back(all);
      total += all;
    }
  }

  double probability(int64_t token) const { return std::exp(static_cast<double>(logits[token]) - most) / total; }
};

}  // namespace

// A token for each slot after `first`, given those before it, from its candidates: (slots, k). levels: of the table's n-grams of
// up to `order` tokens; none: the candidates' own probabilities. uniforms: (slots,), or null for the largest -> tokens: (slots,),
// and q: (slots, k), what they are from.
extern "C" __attribute__((visibility("default"))) void dynamo_lm_chain(
    const Level* levels, int64_t order, const int64_t* ids, const double* probs, int64_t slots, int64_t k, int64_t first,
    double alpha_c, const double* uniforms, int64_t* tokens, double* q) {
  std::vector<int64_t> history{first};
  for (int64_t slot = 0; slot < slots; slot++, ids += k, probs += k, q += k) {
    int64_t length = levels ? std::min<int64_t>(order - 1, history.size()) : 0;
    while (length > 0 && !weighted(levels, history.data() + history.size(), length, ids, probs, k, alpha_c, q)) length--;
    if (length == 0) std::copy(probs, probs + k, q);
    tokens[slot] = ids[uniforms ? drawn_from(q, k, uniforms[slot]) : largest(q, k)];
    history.push_back(tokens[slot]);
  }
}

// Whether the rejection rule refuses `token`, which was drawn from probabilities q of ids: (k,), where the base has a line of
// `size` logits.
extern "C" __attribute__((visibility("default"))) int64_t dynamo_lm_refuses(
    const float* logits, int64_t size, const int64_t* ids, const double* q, int64_t k, int64_t token, double uniform) {
  const int64_t place = std::find(ids, ids + k, token) - ids;
  return uniform * (place < k ? q[place] : 0.0) >= Line(logits, size).probability(token);
}

// The base's own token, by inverse CDF of what it has above q of the distinct ids: (k,), which may be none. cost, unless null ->
// by how much it is likelier than `token`, in nats, at least 0.
extern "C" __attribute__((visibility("default"))) int64_t dynamo_lm_pick(
    const float* logits, int64_t size, const int64_t* ids, const double* q, int64_t k, double uniform, int64_t token,
    double* cost) {
  Line line(logits, size);
  double left = 0, below = 0;
  for (int64_t i = 0; i < k; i++) line.sums[ids[i] / SPAN] -= std::min(weight(logits[ids[i]], line.most), q[i] * line.total);
  for (double& sum : line.sums) left += sum = std::max(sum, 0.0);
  int64_t own = size - 1;  // if nothing is left, or it is no number
  for (size_t block = 0; left > 0 && below <= uniform * left && block < line.sums.size(); block++) {
    if (below + line.sums[block] <= uniform * left) {
      below += line.sums[block];
      continue;
    }
    const int64_t begin = block * SPAN, end = std::min(size, begin + SPAN);
    double weights[SPAN];
    for (int64_t i = begin; i < end; i++) weights[i - begin] = weight(logits[i], line.most);
    for (int64_t i = 0; i < k; i++)
      if (begin <= ids[i] && ids[i] < end) weights[ids[i] - begin] -= q[i] * line.total;
    for (int64_t i = begin; i < end && below <= uniform * left; i++) {
      if (!(weights[i - begin] > 0)) continue;
      below += weights[i - begin];
      own = i;
    }
  }
  if (cost) *cost = std::max(0.0, std::log(line.probability(own)) - std::log(line.probability(token)));
  return own;
}
