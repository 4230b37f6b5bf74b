// Drafts, one row's at a time: drawing a chain of them from weighted candidates, and the exact rejection rule that verifies them.
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

constexpr double NEW = 0.3;                     // of a continuation, as `cooccurrence.lookup.NEW`
constexpr int64_t SHORTEST = 2, LONGEST = 8;  // tokens of the text that are looked for in it, as in `sampling.weights`
constexpr size_t PLACES = 256;                  // where they stood before, as there

// After each of the latest places where the last tokens of a text stood before, the latest first.
std::vector<int64_t> places_before(const int64_t* text, int64_t length) {
  std::vector<int64_t> places;
  for (int64_t place = length - 1; place >= SHORTEST && places.size() < PLACES; place--)
    if (std::equal(text + length - SHORTEST, text + length, text + place - SHORTEST)) places.push_back(place);
  return places;
}

// What the text's own n-grams say of k candidates after its `length` tokens, mixed into their probabilities p.
void mix_in_text(
    const int64_t* text, int64_t length, std::vector<int64_t> places, const int64_t* ids, int64_t k, double* p) {
  std::vector<int64_t> followers;
  for (int64_t n = SHORTEST; n <= LONGEST; n++) {
    const auto other = [&](int64_t place) { return place < n || text[place - n] != text[length - n]; };
    places.erase(std::remove_if(places.begin(), places.end(), other), places.end());
    if (places.empty()) return;
    followers.clear();
    for (int64_t place : places) followers.push_back(text[place]);
    std::sort(followers.begin(), followers.end());
    double distinct = 1;
    for (size_t i = 1; i < followers.size(); i++) distinct += followers[i] != followers[i - 1];
    const double seen = followers.size(), weight = seen / (seen + NEW * distinct);
    for (int64_t i = 0; i < k; i++) {
      const auto [first, last] = std::equal_range(followers.begin(), followers.end(), ids[i]);
      p[i] = weight * ((last - first) / seen) + (1 - weight) * p[i];
    }
  }
}

// The first of ascending tokens that is not below `token`: near the front where it is near, as for one token after another.
const int32_t* not_below(const int32_t* begin, const int32_t* end, int64_t token) {
  int64_t step = 1;
  while (step < end - begin && begin[step] < token) {
    begin += step;
    step *= 2;
  }
  return std::lower_bound(begin, std::min(begin + step, end), token);
}

// How much likelier n-grams make each of k candidates after the `length` tokens of a text than it is alone, in nats.
void log_weights(
    const Level* levels, int64_t order, double rarest, const int64_t* text, int64_t length, const std::vector<int64_t>& places,
    const int64_t* ids, int64_t k, double* weights) {
  std::vector<double> alone(k);
  std::vector<int64_t> ascending(k);  // places of the candidates, so that a row's children are read from front to back
  for (int64_t i = 0; i < k; i++) {
    alone[i] = ids[i] < levels->parents ? std::max(std::exp(static_cast<double>(levels->logs[ids[i]])), rarest) : rarest;
    weights[i] = alone[i];
    ascending[i] = i;
  }
  std::sort(ascending.begin(), ascending.end(), [&](int64_t i, int64_t j) { return ids[i] < ids[j]; });
  for (int64_t n = 1; n < order && n <= length; n++) {
    int64_t row = text[length - n];
    for (int64_t i = 1; i < n && row >= 0; i++) row = child(levels[i], row, text[length - n + i]);
    const Level& level = levels[n];
    if (row < 0 || row >= level.parents || level.shares[2 * row] == 0) break;
    const double weight = level.shares[2 * row], rest = level.shares[2 * row + 1], parent = levels[n - 1].logs[row];
    for (int64_t i = 0; i < k; i++) weights[i] *= rest;
    const int32_t *next = level.tokens + level.offsets[row], *const end = level.tokens + level.offsets[row + 1];
    for (int64_t i : ascending) {
      next = not_below(next, end, ids[i]);
      if (next == end) break;
      if (*next == ids[i]) weights[i] += weight * std::exp(level.logs[next - level.tokens] - parent);
    }
  }
  mix_in_text(text, length, places, ids, k, weights);
  for (int64_t i = 0; i < k; i++) weights[i] = std::log(weights[i] / alone[i]);
}

// What followed the latest tokens of a text before becomes a candidate, too, as `sampling.weights.weigh` says.
void take_followers(const int64_t* text, const std::vector<int64_t>& places, int64_t* ids, double* scores, int64_t k) {
  std::vector<int64_t> followers, added, slots;
  for (int64_t place : places)
    if (std::find(followers.begin(), followers.end(), text[place]) == followers.end()) followers.push_back(text[place]);
  for (int64_t token : followers)
    if (std::find(ids, ids + k, token) == ids + k) added.push_back(token);
  if (added.empty()) return;
  double least = INFINITY;
  for (int64_t i = k - 1; i >= 0; i--) {
    if (scores[i] > -INFINITY) least = std::min(least, scores[i]);
    if (std::find(followers.begin(), followers.end(), ids[i]) == followers.end()) slots.push_back(i);
  }
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t i, int64_t j) { return scores[i] < scores[j]; });
  const size_t count = std::min({slots.size(), added.size(), static_cast<size_t>(k / 2)});
  for (size_t i = 0; i < count; i++) {
    ids[slots[i]] = added[i];
    scores[slots[i]] = least;
  }
}

// q of k candidates after the `length` tokens of a text, from their scores; some of them become others, as `take_followers` says.
void weigh(
    const Level* levels, int64_t order, double rarest, const int64_t* text, int64_t length, double alpha_c, int64_t* ids,
    double* scores, int64_t k, double* q) {
  const std::vector<int64_t> places = places_before(text, length);
  take_followers(text, places, ids, scores, k);
  log_weights(levels, order, rarest, text, length, places, ids, k, q);
  double most = -INFINITY, total = 0;
  for (int64_t i = 0; i < k; i++) most = std::max(most, q[i] = scores[i] + alpha_c * q[i]);
  for (int64_t i = 0; i < k; i++) total += q[i] = std::exp(q[i] - most);
  for (int64_t i = 0; i < k; i++) q[i] /= total;
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

// A token for each slot after the `length` tokens of a text, given those before it, from its candidates: (slots, k), of which the
// text's own may replace some. levels: of the table's n-grams of up to `order` tokens; none: the candidates' own probabilities.
// rarest: the frequency of tokens that were never counted. uniforms: (slots,), or null for the largest -> tokens: (slots,), and q:
// (slots, k), what they are from.
extern "C" __attribute__((visibility("default"))) void dynamo_lm_chain(
    const Level* levels, int64_t order, double rarest, int64_t* ids, const double* probs, int64_t slots, int64_t k,
    const int64_t* text, int64_t length, double alpha_c, const double* uniforms, int64_t* tokens, double* q) {
  std::vector<int64_t> history(text, text + length);
  std::vector<double> scores(k);
  for (int64_t slot = 0; slot < slots; slot++, ids += k, probs += k, q += k) {
    if (levels) {
      for (int64_t i = 0; i < k; i++) scores[i] = std::log(probs[i]);
      weigh(levels, order, rarest, history.data(), history.size(), alpha_c, ids, scores.data(), k, q);
    } else {
      std::copy(probs, probs + k, q);
    }
    tokens[slot] = ids[uniforms ? drawn_from(q, k, uniforms[slot]) : largest(q, k)];
    history.push_back(tokens[slot]);
  }
}

// `weigh`; ids and scores: (k,) -> other ids, perhaps, and q: (k,).
extern "C" __attribute__((visibility("default"))) void dynamo_lm_weigh(
    const Level* levels, int64_t order, double rarest, const int64_t* text, int64_t length, double alpha_c, int64_t* ids,
    double* scores, int64_t k, double* q) {
  weigh(levels, order, rarest, text, length, alpha_c, ids, scores, k, q);
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
