// A whole step of Algorithm 1 (method.md section 4) for heads without links. `sampling.draw_from` says the same with NumPy, but
// on arrays of a few dozen entries calls cost more than what they do.
//
// As in sampler.cpp pointers come from arrays, and the caller checks their types and sizes. Cells always ascend, so that no
// draw hangs on how its tuples were matches. Sums have another order than NumPy's; the tolerances allow for that.

#include <numeric>

namespace {

constexpr int64_t FETCHED = 32;                   // children of each row that are asked for ahead: most have fewer
constexpr int64_t MOST_DENSE = int64_t{1} << 17;  // cells of a grid that is built: a megabyte

struct Tuples {  // what may be drawn of one length, by ascending cell
  std::vector<int64_t> cells, rows;  // rows: where they are in the table
  std::vector<double> scores;        // log of the product of f_i / p^(x_i)^alpha_c; without a table the product of f_i itself

  void clear() {
    cells.clear();
    rows.clear();
    scores.clear();
  }
};

// Every tuple `from` with every candidate whose n-gram is in the table; factors: (k,) what each candidate adds to the score.
//
// The table is large and rows are anywhere in it: what is read later is asked for as soon as its place is known. `more`: so are
// the children of what is found, at the next level.
void grow(const Tuples& from, const int64_t* ids, const double* factors, int64_t k, const Level* level, int64_t vocab_size,
          bool more, Tuples& to) {
  // 1. Which are in the table: no more than there are children.
  thread_local std::vector<int64_t> matches;
  int64_t room = 1;
  for (const int64_t row : from.rows) {
    if (row >= level->parents) continue;  // a token that the table does not know
    const int64_t begin = level->offsets[row], children = level->offsets[row + 1] - begin;
    room += std::min(k, children);
    for (int64_t c = 0; c < std::min(children, FETCHED); c += 16) __builtin_prefetch(level->tokens + begin + c);
  }
  if (static_cast<int64_t>(matches.size()) < 3 * room) matches.resize(3 * room);
  int64_t *const parent = matches.data(), *const rank = parent + room, *const row = rank + room;
  const int64_t hits = dynamo_lm_children(
      level->offsets, level->parents, level->tokens, vocab_size, from.rows.data(), from.rows.size(), ids, k, parent, rank, row);

  // 2. Those of each parent, which are in the order of their tokens, in that of their ranks.
  thread_local std::vector<int64_t> row_of;  // (k,) by rank, where
  thread_local std::vector<uint64_t> marks;  // a bit is set
  row_of.resize(k);
  marks.assign((k + 63) / 64, 0);
  to.cells.resize(hits);
  to.rows.resize(hits);
  to.scores.resize(hits);
  for (int64_t begin = 0, end = 0, next = 0; begin < hits; begin = end) {
    const int64_t before = from.cells[parent[begin]] * k;
    const double score = from.scores[parent[begin]];
    for (; end < hits && parent[end] == parent[begin]; end++) {
      row_of[rank[end]] = row[end];
      marks[rank[end] / 64] |= uint64_t{1} << rank[end] % 64;
    }
    for (size_t word = 0; word < marks.size(); word++) {
      for (; marks[word]; marks[word] &= marks[word] - 1, next++) {
        const int64_t x = 64 * word + __builtin_ctzll(marks[word]);
        to.cells[next] = before + x;
        to.rows[next] = row_of[x];
        to.scores[next] = score + factors[x];
        __builtin_prefetch(level->logs + row_of[x]);
        if (more) __builtin_prefetch(level[1].offsets + row_of[x]);
      }
    }
  }
}

// Every tuple `from` with every candidate, as long as the product of their probabilities is not below `least`.
void multiply(const Tuples& from, const double* probs, int64_t k, double least, Tuples& to) {
  to.clear();
  for (size_t i = 0; i < from.cells.size(); i++) {
    for (int64_t x = 0; x < k; x++) {
      const double product = from.scores[i] * probs[x];
      if (product < least) continue;
      to.cells.push_back(from.cells[i] * k + x);
      to.scores.push_back(product);
    }
  }
}

// `otsu.above_threshold`: which of `count` values Otsu's threshold keeps, given `zeros` further values of 0.
void above_threshold(const double* values, int64_t count, int64_t zeros, uint8_t* keep) {
  const auto [least, most] = std::minmax_element(values, values + count);
  const double lo = zeros ? 0.0 : *least, hi = *most;
  if (hi - lo <= ROUNDING * hi) return std::fill(keep, keep + count, uint8_t{1});
  int64_t histogram[BINS] = {zeros};
  for (int64_t i = 0; i < count; i++) {
    keep[i] = std::clamp(static_cast<int>(std::floor((values[i] - lo) / (hi - lo) * BINS + ROUNDING)), 0, BINS - 1);
    histogram[keep[i]]++;
  }
  const int below = threshold(histogram);
  for (int64_t i = 0; i < count; i++) keep[i] = keep[i] > below;
}

// `otsu.foreground` by the whole blurred grid, which is cheaper where the entries reach most of it.
void dense_foreground(const int64_t* cells, const double* values, int64_t count, int64_t k, int64_t total, uint8_t* keep) {
  thread_local std::vector<double> grid, other;
  thread_local std::vector<uint8_t> kept;
  grid.assign(total, 0.0);
  other.resize(total);
  kept.resize(total);
  for (int64_t i = 0; i < count; i++) grid[cells[i]] = values[i];
  for (int64_t stride = 1; k > 1 && stride < total; stride *= k) {
    for (int64_t line = 0; line < total / stride; line++) {
      const int64_t x = line % k;
      const double* const here = &grid[line * stride];
      const double* const left = here + (x == 0 ? stride : -stride);  // beyond the border lies what is next to it
      const double* const right = here + (x == k - 1 ? -stride : stride);
      for (int64_t i = 0; i < stride; i++) other[line * stride + i] = here[i] * 0.5 + left[i] * 0.25 + right[i] * 0.25;
    }
    grid.swap(other);
  }
  above_threshold(grid.data(), total, 0, kept.data());
  for (int64_t i = 0; i < count; i++) keep[i] = kept[cells[i]];
}

// `otsu.foreground`.
void foreground(const std::vector<int64_t>& cells, const std::vector<double>& values, int64_t k, int64_t m, bool blur,
                uint8_t* keep) {
  const int64_t count = cells.size();
  int64_t total = 1;
  double reach = count;  // at most so many cells does the blur reach
  for (int64_t axis = 0; axis < m; axis++) {
    total *= k;
    reach *= 3;
  }
  if (!blur) above_threshold(values.data(), count, total - count, keep);
  else if (reach < total || total > MOST_DENSE) dynamo_lm_foreground(cells.data(), values.data(), count, k, m, keep);
  else dense_foreground(cells.data(), values.data(), count, k, total, keep);
}

}  // namespace

// One draw from n heads of k candidates. ids, probs: (n, k), as in `joint.Heads`. present: (vocabulary,), whether a token is in
// the context. levels: of the table's n-grams of 1 .. n tokens; none: the product of the heads. otsu: 0 without, 1 by the
// entries' own values, 2 by blurred ones. uniform: from 0, below 1; negative: the largest entry is taken. -> J of the tuple that
// is drawn. drawn: (n + 1,) its length, and its tokens.
extern "C" __attribute__((visibility("default"))) double dynamo_lm_draw(
    const int64_t* ids, const double* probs, int64_t n, int64_t k, const uint8_t* present, const Level* levels, double alpha_c,
    double eps_b, int64_t otsu, double penalty, double uniform, int64_t* drawn) {
  // 1. The tuples of every length, token by token.
  thread_local std::vector<Tuples> lengths;
  thread_local std::vector<double> factors;
  const int64_t widest = eps_b == 1 ? 1 : n;  // a penalty below 1 may lift an entry above 1, but 1 means: one token
  if (static_cast<int64_t>(lengths.size()) < widest) lengths.resize(widest);
  const auto prepare = [&](int64_t head) {  // log of f / p^^alpha_c; tokens that were never counted are in no n-gram
    for (int64_t x = 0; x < k; x++) {
      const int64_t token = ids[head * k + x];
      const double log = token < levels->parents ? levels->logs[token] : -INFINITY;
      factors[x] = log > -INFINITY ? std::log(probs[head * k + x]) - alpha_c * log : -INFINITY;
    }
  };
  lengths[0].cells.resize(k);
  std::iota(lengths[0].cells.begin(), lengths[0].cells.end(), 0);
  if (levels && widest > 1) {
    factors.resize(k);
    prepare(0);
    lengths[0].rows.assign(ids, ids + k);
    lengths[0].scores = factors;
    for (int64_t m = 1; m < widest; m++) {
      prepare(m);
      grow(lengths[m - 1], ids + m * k, factors.data(), k, levels + m, levels->parents, m + 1 < widest, lengths[m]);
    }
  } else {
    lengths[0].scores.assign(probs, probs + k);
    const double least = std::pow(eps_b, n - 1) * (1 - ROUNDING);  // the factors to come are at most 1
    for (int64_t m = 1; m < widest; m++) multiply(lengths[m - 1], probs + m * k, k, least, lengths[m]);
  }

  thread_local std::vector<int64_t> cells;         // of the entries that are left,
  thread_local std::vector<double> joint, values;  // their J, and it penalised
  thread_local std::vector<uint8_t> keep;
  for (int64_t m = widest; m > 0; m--) {
    // 2. J: normalised over the grid, which the product of heads is already.
    const Tuples& tuples = lengths[m - 1];
    const int64_t count = tuples.cells.size();
    if (count == 0) continue;
    const double* weights = m == 1 ? probs : tuples.scores.data();
    double sum = 1.0;
    if (levels && m > 1) {
      values.resize(count);
      for (int64_t i = 0; i < count; i++) values[i] = tuples.scores[i] + alpha_c * levels[m - 1].logs[tuples.rows[i]];
      const double top = *std::max_element(values.begin(), values.end());
      if (top == -INFINITY) continue;
      sum = 0.0;
      for (double& value : values) sum += value = std::exp(value - top);
      weights = values.data();
    }

    // 3. Static threshold: eps_b^(m-1), which is also what the largest entry must exceed.
    const double bound = m > 1 ? std::pow(eps_b, m - 1) : 0.0, limit = bound * (1 + ROUNDING);
    if (penalty >= 1 && *std::max_element(weights, weights + count) <= limit * sum) continue;  // it only lowers it
    const double least = bound * (1 - ROUNDING) * sum;
    cells.clear();
    joint.clear();
    for (int64_t i = 0; i < count; i++) {
      if (weights[i] < least || weights[i] == 0.0) continue;
      cells.push_back(tuples.cells[i]);
      joint.push_back(weights[i] / sum);
    }
    if (cells.empty()) continue;

    // 4. Otsu; the largest entry always survives, so one entry needs no threshold.
    if (otsu && m > 1 && cells.size() > 1) {
      const size_t left = cells.size();
      keep.resize(left);
      foreground(cells, joint, k, m, otsu == 2, keep.data());
      keep[largest(joint.data(), left)] = 1;
      size_t kept = 0;
      for (size_t i = 0; i < left; i++) {
        cells[kept] = cells[i];
        joint[kept] = joint[i];
        kept += keep[i];
      }
      cells.resize(kept);
      joint.resize(kept);
    }

    // 5. Repetition penalty: one factor per position whose token is in the context or earlier in the tuple.
    drawn[0] = m;
    int64_t* const tokens = drawn + 1;
    const auto spell = [&](int64_t cell) {
      for (int64_t i = m - 1; i >= 0; i--, cell /= k) tokens[i] = ids[i * k + cell % k];
    };
    values = joint;
    for (size_t e = 0; penalty != 1 && e < cells.size(); e++) {
      spell(cells[e]);
      int64_t repeats = 0;
      for (int64_t i = 0; i < m; i++) repeats += present[tokens[i]] || std::find(tokens, tokens + i, tokens[i]) != tokens + i;
      if (repeats) values[e] /= std::pow(penalty, repeats);
    }

    // 6. Back off unless some entry strictly exceeds the limit; else choose by inverse CDF.
    if (*std::max_element(values.begin(), values.end()) <= limit) continue;
    const int64_t slot = uniform < 0 ? largest(values.data(), values.size()) : drawn_from(values.data(), values.size(), uniform);
    spell(cells[slot]);
    return joint[slot];
  }
  drawn[0] = 0;
  return 0.0;
}
