// Drafts, one row's at a time: drawing a chain of them from the masked conditionals.
//
// As in sampler.cpp pointers come from arrays, and the caller has seen to their types and sizes. `sampling.draft_from` says the
// same without C++.

namespace {

struct Level {
  const int64_t* keys;     // (rows,) parent * vocab_size + token, ascending
  const int64_t* offsets;  // (parents + 1,) where the children of each begin; of the first level none
  const float* logs;       // (rows,) log frequencies
};

struct Trie {  // as `Lookup.trie` lays it out, with `order` levels
  int64_t order, vocab_size;
  Level levels[1];

  // The row of the n-gram that continues a row of the level before; -1 if there is none.
  int64_t child(int64_t row, int64_t token, const Level& level) const {
    const int64_t *begin = level.keys + level.offsets[row], *end = level.keys + level.offsets[row + 1];
    const int64_t key = row * vocab_size + token;  // a token that the table does not know is behind the last child
    const int64_t* const found = std::lower_bound(begin, end, key);
    return found < end && *found == key ? found - level.keys : -1;
  }

  int64_t row(const int64_t* tokens, int64_t length) const {
    int64_t row = tokens[0] < vocab_size ? tokens[0] : -1;
    for (int64_t i = 1; i < length && row >= 0; i++) row = child(row, tokens[i], levels[i]);
    return row;
  }

  double unigram(int64_t token) const { return token < vocab_size ? levels[0].logs[token] : -INFINITY; }
};

// q of k candidates behind the `length` tokens before `end`; false if none of them was seen there.
bool weighted(
    const Trie& trie, const int64_t* end, int64_t length, const int64_t* ids, const double* probs, int64_t k, double alpha_c,
    double* q) {
  const int64_t row = trie.row(end - length, length);
  if (row < 0) return false;
  const Level& level = trie.levels[length];
  double most = -INFINITY, total = 0;
  for (int64_t i = 0; i < k; i++) {
    const int64_t found = trie.child(row, ids[i], level);
    q[i] = -INFINITY;
    if (found >= 0) q[i] = std::log(probs[i]) + alpha_c * (level.logs[found] - std::max(trie.unigram(ids[i]), -1e30));
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
int64_t drawn(const double* q, int64_t k, double uniform) {
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

}  // namespace

// A token for each slot behind `first`, given those before it, from its candidates: (slots, k). uniforms: (slots,), or null for the
// largest; trie: null for the candidates' own probabilities -> tokens: (slots,), and q, what they were drawn from: (slots, k).
extern "C" __attribute__((visibility("default"))) void dynamo_lm_chain(
    const Trie* trie, const int64_t* ids, const double* probs, int64_t slots, int64_t k, int64_t first, double alpha_c,
    const double* uniforms, int64_t* tokens, double* q) {
  std::vector<int64_t> history{first};
  for (int64_t slot = 0; slot < slots; slot++, ids += k, probs += k, q += k) {
    int64_t length = trie ? std::min<int64_t>(trie->order - 1, history.size()) : 0;
    while (length > 0 && !weighted(*trie, history.data() + history.size(), length, ids, probs, k, alpha_c, q)) length--;
    if (length == 0) std::copy(probs, probs + k, q);
    tokens[slot] = ids[uniforms ? drawn(q, k, uniforms[slot]) : largest(q, k)];
    history.push_back(tokens[slot]);
  }
}
