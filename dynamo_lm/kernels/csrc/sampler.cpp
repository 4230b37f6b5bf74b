// The host's part of a step (docs/method.md section 4): the best candidates of a line of logits, which n-grams were counted, and
// which entries of a grid are foreground.
//
// Nothing here knows torch: pointers come from arrays, and the caller checks their types and sizes. Without C++ the same is done by
// `top_k.highest`, `Lookup.children` and `otsu.foreground`, whose tolerances allow for sums in another order.

namespace {

constexpr int64_t SEARCH_FROM = 16;  // children per candidate beyond which every candidate is searched for (measured)
constexpr double ROUNDING = 1e-9;    // as in otsu.py
constexpr int BINS = 256;

typedef int64_t Pairs __attribute__((vector_size(32)));

// The share of a value at x of k that the blur gives to y, at most one place away: 1/4 1/2 1/4 with reflect-101 borders, where
// the outermost places read their neighbour twice.
inline double share(int64_t x, int64_t y, int64_t k) {
  if (x == y) return k == 1 ? 1.0 : 0.5;
  return (y == 0 || y == k - 1) ? 0.5 : 0.25;
}

struct Siblings {  // nodes of one parent, and what share of them falls on the cells in question
  int64_t begin, end;
  double weight;
};

// One axis of a grid: its entries' distinct coordinates up to this axis, in order, are the nodes of one level of a trie.
struct Axis {
  std::vector<int64_t> at;     // (nodes,) coordinate on this axis
  std::vector<int64_t> first;  // (nodes + 1,) where the children of each begin on the next axis
  std::vector<double> most;    // (nodes,) largest value of the entries below
  std::vector<double> line;    // (k,) zeros between its uses
  std::vector<Siblings> near;  // whose entries fall on the cells in question
};

// The blurred grid of few entries. Most cells are never looked at: a blurred value is a mean of the values around it, so the
// largest of these bound it.
class Blurred {
 public:
  Blurred(const int64_t* cells, const double* values, int64_t count, int64_t k, int64_t m) : k(k), axes(m) {
    std::vector<int64_t> prefix(cells, cells + count);
    std::vector<double> most(values, values + count);
    for (int64_t axis = m - 1; axis >= 0; axis--) {
      Axis& here = axes[axis];
      here.line.assign(k, 0.0);
      here.most = most;
      here.at.resize(prefix.size());
      std::vector<int64_t>* const first = axis ? &axes[axis - 1].first : nullptr;
      size_t parents = 0;
      for (size_t i = 0; i < prefix.size(); i++) {
        const int64_t parent = prefix[i] / k;
        here.at[i] = prefix[i] - parent * k;
        if (parents && prefix[parents - 1] == parent) {
          most[parents - 1] = std::max(most[parents - 1], most[i]);
          continue;
        }
        if (first) first->push_back(i);
        prefix[parents] = parent;
        most[parents++] = most[i];
      }
      if (first) first->push_back(here.at.size());
      prefix.resize(parents);
      most.resize(parents);
    }
  }

  // Calls visit(line, low, high, own) for every line of cells along the last axis that may hold a value of `floor` or more:
  // its values (k,), which are 0 before low and after high, and the entries that lie on it.
  template <typename Visit>
  void lines(const double& floor, const Visit& visit) {
    const Siblings all{0, static_cast<int64_t>(axes[0].at.size()), 1.0};
    axes[0].near.assign(1, all);
    descend(0, all, floor, visit);
  }

  int64_t coordinate(int64_t entry) const { return axes.back().at[entry]; }

 private:
  template <typename Visit>
  void descend(size_t axis, const Siblings& own, const double& floor, const Visit& visit) {
    Axis& here = axes[axis];
    double* const line = here.line.data();
    int64_t low = k - 1, high = 0;
    for (const Siblings& siblings : here.near) {
      for (int64_t i = siblings.begin; i < siblings.end; i++) {
        const int64_t x = here.at[i], from = std::max<int64_t>(x - 1, 0), to = std::min(x + 1, k - 1);
        const double value = here.most[i] * siblings.weight;
        for (int64_t y = from; y <= to; y++) line[y] += value * share(x, y, k);
        low = std::min(low, from);
        high = std::max(high, to);
      }
    }
    if (axis + 1 == axes.size()) {
      visit(line, low, high, own);
    } else {
      Axis& next = axes[axis + 1];
      for (int64_t y = low; y <= high; y++) {
        if (line[y] == 0.0 || line[y] < floor) continue;
        next.near.clear();
        for (const Siblings& siblings : here.near)
          for (int64_t i = place(here, siblings, y - 1); i < siblings.end && here.at[i] <= y + 1; i++)
            next.near.push_back({here.first[i], here.first[i + 1], siblings.weight * share(here.at[i], y, k)});
        const int64_t i = place(here, own, y);
        const bool there = i < own.end && here.at[i] == y;
        descend(axis + 1, there ? Siblings{here.first[i], here.first[i + 1], 1.0} : Siblings{0, 0, 1.0}, floor, visit);
      }
    }
    std::fill(line + low, line + high + 1, 0.0);
  }

  static int64_t place(const Axis& axis, const Siblings& among, int64_t x) {
    const auto begin = axis.at.begin();
    return std::lower_bound(begin + among.begin, begin + among.end, x) - begin;
  }

  const int64_t k;
  std::vector<Axis> axes;
};

// The bin below which Otsu's threshold lies, as `above_threshold` defines it: what is in a higher one stays.
int threshold(const int64_t* histogram) {
  double spread[BINS - 1];
  int64_t size = 0, sum = 0, sizes = 0, sums = 0;
  for (int t = 0; t < BINS; t++) {
    sizes += histogram[t];
    sums += histogram[t] * t;
  }
  for (int t = 0; t < BINS - 1; t++) {
    size += histogram[t];
    sum += histogram[t] * t;
    const double below = size, above = sizes - size;
    const double apart = sum / below - (sums - sum) / above;
    spread[t] = below * above * apart * apart;
  }
  const double enough = *std::max_element(spread, spread + BINS - 1) * (1 - ROUNDING);
  return std::find_if(spread, spread + BINS - 1, [&](double s) { return s >= enough; }) - spread;
}

struct Level {  // the n-grams of one length, as `Lookup.pointers` packs them
  const int64_t* offsets;  // (parents + 1,) where the children of each shorter one begin; none for single tokens
  int64_t parents;
  const int32_t* tokens;  // (rows,) the last token of each
  const float* logs;      // (rows,) log frequency of each
  const float* shares;    // (parents, 2) the weight of each one's children, and what they leave to shorter n-grams
};
static_assert(sizeof(Level) == 5 * sizeof(int64_t));

// The largest of some logits.
inline float peak(const float* logits, int64_t size) {
  int64_t i = 0;
  float most = -INFINITY;
  if (size >= 8) {
    Lanes lanes = load(logits);
    for (i = 8; i + 8 <= size; i += 8) {
      const Lanes next = load(logits + i);
      lanes = next > lanes ? next : lanes;
    }
    for (int j = 0; j < 8; j++) most = std::max(most, lanes[j]);
  }
  for (; i < size; i++) most = std::max(most, logits[i]);
  return most;
}

}  // namespace

// Which of `count` entries of the k^m grid Otsu's threshold keeps, judged by their blurred values. cells: ascending, values:
// above 0 -> keep: (count,), 0 or 1.
extern "C" __attribute__((visibility("default"))) void dynamo_lm_foreground(
    const int64_t* cells, const double* values, int64_t count, int64_t k, int64_t m, uint8_t* keep) {
  if (count == 0) return;
  Blurred blurred(cells, values, count, k, m);
  int64_t total = 1;
  double reach = count;  // at most so many cells is there anything on
  for (int64_t axis = 0; axis < m; axis++) {
    total *= k;
    reach *= 3;
  }

  // 1. The range of the values: with cells that nothing falls on, it begins at 0.
  double lo = 0.0, hi = 0.0, floor = 0.0;
  if (reach >= total) {
    int64_t reached = 0;
    lo = HUGE_VAL;
    blurred.lines(floor, [&](const double* line, int64_t low, int64_t high, const Siblings&) {
      for (int64_t y = low; y <= high; y++) {
        if (line[y] == 0.0) continue;
        reached++;
        lo = std::min(lo, line[y]);
        hi = std::max(hi, line[y]);
      }
    });
    if (reached < total) lo = 0.0;
  } else {
    blurred.lines(floor, [&](const double* line, int64_t low, int64_t high, const Siblings&) {
      floor = hi = std::max(hi, *std::max_element(line + low, line + high + 1));
    });
  }
  if (hi - lo <= ROUNDING * hi) return std::fill(keep, keep + count, uint8_t{1});

  // 2. Their bins. The first one's need not be looked at, where it begins at 0.
  int64_t histogram[BINS] = {total};
  floor = lo > 0 ? 0.0 : hi / BINS * (1 - 2 * ROUNDING);
  std::fill(keep, keep + count, uint8_t{0});
  const auto bin = [&](double value) {
    return std::clamp(static_cast<int>(std::floor((value - lo) / (hi - lo) * BINS + ROUNDING)), 0, BINS - 1);
  };
  blurred.lines(floor, [&](const double* line, int64_t low, int64_t high, const Siblings& own) {
    for (int64_t y = low; y <= high; y++) {
      if (line[y] < floor) continue;
      histogram[0]--;
      histogram[bin(line[y])]++;
    }
    for (int64_t i = own.begin; i < own.end; i++) {
      const double value = line[blurred.coordinate(i)];
      if (value >= floor) keep[i] = bin(value);
    }
  });

  // 3. The threshold.
  const int below = threshold(histogram);
  for (int64_t i = 0; i < count; i++) keep[i] = keep[i] > below;
}

// The n-grams of `rows` (h,) followed by each of the distinct tokens `ids` (k,) that are in the table: the children of row r of
// `parents` are `tokens` offsets[r] .. offsets[r + 1] - 1, ascending and below vocab_size. -> how many, by rising row, then token:
// the index of each into `rows`, into `ids` and into `tokens`; there is room for h * k + 1 of them.
extern "C" __attribute__((visibility("default"))) int64_t dynamo_lm_children(
    const int64_t* offsets, int64_t parents, const int32_t* tokens, int64_t vocab_size, const int64_t* rows, int64_t h,
    const int64_t* ids, int64_t k, int64_t* parent, int64_t* rank, int64_t* row) {
  thread_local std::vector<int32_t> rank_of;  // per token its index into ids; -1 between calls
  if (rank_of.size() < static_cast<size_t>(vocab_size)) rank_of.assign(vocab_size, -1);
  std::vector<int32_t> sorted;
  for (int64_t i = 0; i < k; i++) {
    if (ids[i] < 0 || ids[i] >= vocab_size) continue;
    rank_of[ids[i]] = i;
    sorted.push_back(ids[i]);
  }
  std::sort(sorted.begin(), sorted.end());
  int64_t hits = 0;
  const auto look = [&](int64_t r, int64_t c) {  // without a branch, which would be guessed wrong at every hit
    const int64_t at = rank_of[tokens[c]];  // kept: to read it back, every turn would wait for the one before
    parent[hits] = r;
    rank[hits] = at;
    row[hits] = c;
    hits += at >= 0;
  };
  for (int64_t r = 0; r < h; r++) {
    if (rows[r] < 0 || rows[r] >= parents) continue;  // a token that the table does not know has no children
    int64_t c = offsets[rows[r]];
    const int64_t end = offsets[rows[r] + 1];
    if (end - c > SEARCH_FROM * k) {
      for (const int32_t token : sorted) {
        c = std::lower_bound(tokens + c, tokens + end, token) - tokens;
        if (c < end && tokens[c] == token) look(r, c);
      }
    } else {
      for (; c < end; c++) look(r, c);
    }
  }
  for (const int32_t token : sorted) rank_of[token] = -1;
  return hits;
}

// The `most` largest of every line of `size` logits, falling, equal ones by increasing id -> ids, values: (lines, most). Lines in
// which one of the largest is not a number are left to the caller: -> whether there was any.
extern "C" __attribute__((visibility("default"))) int64_t dynamo_lm_highest(
    const float* logits, int64_t lines, int64_t size, int64_t most, int64_t* ids, double* values) {
  std::vector<float> tops;
  std::vector<std::pair<float, int64_t>> candidates;
  for (int64_t line = 0; line < lines; line++, logits += size) {
    // 1. The largest of each of some parts: of `most` different ones the least bounds what is sought from below.
    const int64_t part = std::max<int64_t>(8, size / (4 * most) / 8 * 8);
    tops.clear();
    for (int64_t begin = 0; begin < size; begin += part) {
      const int64_t end = std::min(size, begin + part);
      tops.push_back(peak(logits + begin, end - begin));
    }
    float bound = -INFINITY;
    if (static_cast<int64_t>(tops.size()) >= most) {
      std::nth_element(tops.begin(), tops.begin() + (most - 1), tops.end(), std::greater<float>());
      bound = tops[most - 1];
    }

    // 2. Everything above it, in order.
    candidates.clear();
    const Lanes least = Lanes{} + bound;
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) {
      const auto below = load(logits + i) < least;  // what is not a number is not below
      const Pairs pairs = (Pairs)below;
      if ((pairs[0] & pairs[1] & pairs[2] & pairs[3]) == -1) continue;
      for (int j = 0; j < 8; j++)
        if (!below[j]) candidates.emplace_back(logits[i + j], i + j);
    }
    for (; i < size; i++)
      if (!(logits[i] < bound)) candidates.emplace_back(logits[i], i);
    for (const auto& entry : candidates)
      if (std::isnan(entry.first)) return 1;
    std::partial_sort(candidates.begin(), candidates.begin() + most, candidates.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    for (int64_t j = 0; j < most; j++) {
      *values++ = candidates[j].first;
      *ids++ = candidates[j].second;
    }
  }
  return 0;
}
