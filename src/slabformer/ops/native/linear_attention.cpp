// Linear attention with its depthwise convolution on a CPU: one pass over keys and values, one over queries and values.
//
//   sums = relu(k + table)^T [v, 1],   out = relu(q) sums_v / (relu(q) . sums_1 + eps) + conv(v)
//
// where q and v are what the projection left plus its biases, q_bias (H, D) and v_bias (H, E).
//
// Built for one head width, value width and dtype at a time (build.py): -DD=64 -DE=64 -DToken=float, or BFloat16 for
// tokens stored so. All arithmetic is float32. Shapes: q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), out (B, H, N, E)
// in any strides whose last is 1; table (H, M, D); taps (S, K * K, E) and bias (S, E) with S 1 or H; mask (B, M).

#include <algorithm>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

static_assert(D % 16 == 0 && E % 16 == 0, "vectors are read whole");
constexpr int MOST_COLUMNS = REGISTERS / 4, MOST_ROWS = 12;
constexpr int KEY_TILE = 32;        // tokens whose keys and values stay in the first cache
constexpr int AHEAD = 16;           // tokens to fetch before they are read
constexpr int LONGEST_KERNEL = 31;  // of the convolution, on either axis
constexpr int64_t ROW_WITHOUT_GRID = 48;

using Index = int64_t;

// Columns at once, in vectors: the most that divide the value width; and rows at once, whose sums fit the registers.
constexpr int columns_at_once() {
  int most = 1;
  for (int count = 1; count <= MOST_COLUMNS; ++count)
    if (E / WIDTH % count == 0) most = count;
  return most;
}
constexpr int COLUMNS = columns_at_once();
constexpr int ROWS = std::min(MOST_ROWS, REGISTERS / COLUMNS);
constexpr int KEY_ROWS = ROWS >= 8 ? 8 : ROWS >= 4 ? 4 : 2;
constexpr int STATE = D * E + D;  // sums of a head: D rows of E values, then D keys

// total[r][c] += sum over i of a[i * a_step + r * a_row] * b[i * E + c]
template <int R>
inline void multiply_add(Vector (&total)[R][COLUMNS], const float* a, int a_step, int a_row, const float* b, int length) {
  for (int i = 0; i < length; ++i) {
    Vector row[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) row[c] = load(b + i * E + c * WIDTH);
    UNROLL for (int r = 0; r < R; ++r) {
      const float factor = a[i * a_step + r * a_row];
      UNROLL for (int c = 0; c < COLUMNS; ++c) total[r][c] += factor * row[c];
    }
  }
}

struct Strides {
  Index batch, head, token;
};

template <typename T>
void prefetch(const T* token, Index stride, int width) {
  for (int i = 0; i < width; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(token + AHEAD * stride + i);
}

template <typename T>
struct Attention {
  const T *q, *k, *v, *table;
  const bool* mask;
  const float *q_bias, *v_bias, *taps, *bias;
  T* out;
  Index B, H, N, M, K, height, width, num_kernels;
  Strides q_strides, k_strides, v_strides, out_strides, table_strides;
  float eps;

  bool is_valid(Index b, Index token) const { return !mask || mask[b * M + token]; }

  // The sums of heads [first, last) over keys [begin, end), all heads of a tile before the next: they lie side by side.
  void sum_keys(Index b, Index first, Index last, Index begin, Index end, float* states, float* scratch) const {
    float *keys = scratch, *values = scratch + KEY_TILE * D;
    std::fill(states, states + (last - first) * STATE, 0.0f);
    for (Index start = begin; start < end; start += KEY_TILE) {
      const int length = static_cast<int>(std::min<Index>(KEY_TILE, end - start));
      for (Index h = first; h < last; ++h) {
        float* state = states + (h - first) * STATE;
        for (int i = 0; i < length; ++i) {
          read_key(b, h, start + i, keys + i * D);
          read_value(b, h, start + i, values + i * E);
          for (int d = 0; d < D; d += WIDTH) store(state + D * E + d, load(state + D * E + d) + load(keys + i * D + d));
        }
        for (int column = 0; column < E; column += COLUMNS * WIDTH)
          for (int d = 0; d < D; d += KEY_ROWS) add_products(state + d * E + column, keys + d, values + column, length);
      }
    }
  }

  void read_key(Index b, Index h, Index token, float* key) const {
    const T* from = k + b * k_strides.batch + h * k_strides.head + token * k_strides.token;
    prefetch(from, k_strides.token, D);
    const bool valid = is_valid(b, token);
    for (int d = 0; d < D; d += WIDTH) {
      Vector x = load(from + d);
      if (table) x += load(table + h * table_strides.head + token * table_strides.token + d);
      store(key + d, valid ? relu(x) : Vector{});
    }
  }

  void read_value(Index b, Index h, Index token, float* value) const {
    const T* from = v + b * v_strides.batch + h * v_strides.head + token * v_strides.token;
    prefetch(from, v_strides.token, E);
    const bool valid = is_valid(b, token);
    for (int e = 0; e < E; e += WIDTH) {
      const Vector x = v_bias ? load(from + e) + load(v_bias + h * E + e) : load(from + e);
      store(value + e, valid ? x : Vector{});
    }
  }

  static void add_products(float* state, const float* keys, const float* values, int length) {
    Vector total[KEY_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < KEY_ROWS; ++r)
      UNROLL for (int c = 0; c < COLUMNS; ++c) total[r][c] = load(state + r * E + c * WIDTH);
    multiply_add<KEY_ROWS>(total, keys, D, 1, values, length);
    UNROLL for (int r = 0; r < KEY_ROWS; ++r)
      UNROLL for (int c = 0; c < COLUMNS; ++c) store(state + r * E + c * WIDTH, total[r][c]);
  }

  Index padded_width() const { return width + K - (K > 0); }
  Index window_size() const { return K * padded_width() * E; }

  // Outputs of heads [first, last) on rows [top, bottom) of the grid. The last K rows of values stay in `windows`, one
  // ring of rows a head, with zeros on either side.
  void attend(Index b, Index first, Index last, Index top, Index bottom, const float* states, float* scratch) const {
    float *queries = scratch, *windows = scratch + ROWS * D;
    const Index border = K / 2;
    std::fill(windows, windows + (last - first) * window_size(), 0.0f);
    Index next = std::max<Index>(0, top - border);  // row of values
    for (Index y = top; y < bottom; ++y) {
      for (; taps && next < std::min(height, y + border + 1); ++next)
        for (Index h = first; h < last; ++h) read_row(b, h, next, windows + (h - first) * window_size());
      for (Index h = first; h < last; ++h)
        attend_row(b, h, y, states + (h - first) * STATE, windows + (h - first) * window_size(), queries);
    }
  }

  void read_row(Index b, Index h, Index y, float* window) const {
    float* row = window + (y % K * padded_width() + K / 2) * E;
    for (Index x = 0; x < width; ++x) read_value(b, h, y * width + x, row + x * E);
  }

  void attend_row(Index b, Index h, Index y, const float* state, const float* window, float* queries) const {
    const float* rows[LONGEST_KERNEL];
    for (Index i = 0; i < K; ++i) {
      const Index from = y + i - K / 2;
      rows[i] = from < 0 || from >= height ? nullptr : window + from % K * padded_width() * E;
    }
    const Index length = std::min(width, N - y * width), num_tiles = (length + ROWS - 1) / ROWS;
    for (Index t = 0; t < num_tiles; ++t) {
      const Index x = t * length / num_tiles, count = (t + 1) * length / num_tiles - x;
      float gains[ROWS];
      for (Index i = 0; i < count; ++i) gains[i] = read_query(b, h, y * width + x + i, state + D * E, queries + i * D);
      T* to = out + b * out_strides.batch + h * out_strides.head + (y * width + x) * out_strides.token;
      for (int column = 0; column < E; column += COLUMNS * WIDTH)
        write_any<ROWS>(count, h, state + column, queries, gains, rows, x, column, to + column);
    }
  }

  // One query behind its ReLU; returns what its products are multiplied by.
  float read_query(Index b, Index h, Index token, const float* key_sums, float* query) const {
    const T* from = q + b * q_strides.batch + h * q_strides.head + token * q_strides.token;
    prefetch(from, q_strides.token, D);
    Vector normaliser = {};
    for (int d = 0; d < D; d += WIDTH) {
      const Vector x = relu(q_bias ? load(from + d) + load(q_bias + h * D + d) : load(from + d));
      store(query + d, x);
      normaliser += x * load(key_sums + d);
    }
    return 1.0f / (sum(normaliser) + eps);
  }

  template <int R>
  void write_any(Index count, Index h, const float* state, const float* queries, const float* gains,
                 const float* const* rows, Index x, int column, T* to) const {
    if constexpr (R > 0) {
      if (count == R) return write<R>(h, state, queries, gains, rows, x, column, to);
      write_any<R - 1>(count, h, state, queries, gains, rows, x, column, to);
    }
  }

  // R neighbours in a row of the grid: products, normalised, and the convolution on top, all in registers.
  template <int R>
  void write(Index h, const float* state, const float* queries, const float* gains, const float* const* rows, Index x,
             int column, T* to) const {
    Vector total[R][COLUMNS] = {};
    multiply_add<R>(total, queries, 1, D, state, D);
    const Index kernel = num_kernels > 1 ? h : 0;
    UNROLL for (int c = 0; c < COLUMNS; ++c) {
      const Vector shift = bias ? load(bias + kernel * E + column + c * WIDTH) : Vector{};
      UNROLL for (int r = 0; r < R; ++r) total[r][c] = total[r][c] * gains[r] + shift;
    }
    for (Index i = 0; i < K * K; ++i) {
      if (!rows[i / K]) continue;
      const float* values = rows[i / K] + (x + i % K) * E + column;
      const float* tap = taps + (kernel * K * K + i) * E + column;
      UNROLL for (int c = 0; c < COLUMNS; ++c) {
        const Vector factor = load(tap + c * WIDTH);
        UNROLL for (int r = 0; r < R; ++r) total[r][c] += factor * load(values + r * E + c * WIDTH);
      }
    }
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int c = 0; c < COLUMNS; ++c) store(to + r * out_strides.token + c * WIDTH, total[r][c]);
  }

  // Work for every thread: images, then groups of heads, then, where these are too few, parts of the tokens.
  void run(int threads) const {
    const Index wanted = std::min(H, (threads + B - 1) / B), at_once = (H + wanted - 1) / wanted;
    const Index groups = (H + at_once - 1) / at_once;
    const Index parts = std::min((threads + B * groups - 1) / (B * groups), std::min(height, M));
    const Index scratch = std::max<Index>(KEY_TILE * (D + E), ROWS * D + at_once * window_size());
    const Index num_states = parts > 1 ? B * H * parts : threads * at_once;
    const auto buffer = allocate(num_states * STATE + threads * scratch);
    float *states = buffer.get(), *scratches = states + num_states * STATE;
    if (parts == 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (Index i = 0; i < B * groups; ++i) {
        const Index b = i / groups, first = i % groups * at_once, last = std::min(H, first + at_once);
        float *state = states + thread() * at_once * STATE, *own = scratches + thread() * scratch;
        sum_keys(b, first, last, 0, M, state, own);
        attend(b, first, last, 0, height, state, own);
      }
      return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index i = 0; i < B * H * parts; ++i) {
      const Index b = i / parts / H, h = i / parts % H, part = i % parts;
      sum_keys(b, h, h + 1, part * M / parts, (part + 1) * M / parts, states + i * STATE, scratches + thread() * scratch);
    }
    for (Index i = 0; i < B * H * parts; ++i)
      for (Index j = 0; i % parts && j < STATE; ++j) states[i / parts * parts * STATE + j] += states[i * STATE + j];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index i = 0; i < B * H * parts; ++i) {
      const Index b = i / parts / H, h = i / parts % H, part = i % parts;
      const Index top = part * height / parts, bottom = (part + 1) * height / parts;
      attend(b, h, h + 1, top, bottom, states + i / parts * parts * STATE, scratches + thread() * scratch);
    }
  }

  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  static std::unique_ptr<float[], Free> allocate(Index count) {
    return std::unique_ptr<float[], Free>(static_cast<float*>(::operator new[](count * 4, std::align_val_t(64))));
  }
};

}  // namespace

// Sizes: B, H, N, M, K, height and width of the grid (0 without one), kernels, then three strides of q, k, v and out,
// and two of the table. Returns 0, or 1 where memory is short.
extern "C" int linear_attention(const Token* q, const Token* k, const Token* v, const Token* table, const bool* mask,
                                const float* q_bias, const float* v_bias, const float* taps, const float* bias,
                                Token* out, const int64_t* n, float eps, int threads) {
  const auto strides = [n](int i) { return Strides{n[i], n[i + 1], n[i + 2]}; };
  const Index width = n[6] ? n[6] : std::min(n[2], ROW_WITHOUT_GRID), height = n[6] ? n[5] : (n[2] + width - 1) / width;
  const Attention<Token> attention{q,      k,    v,    table,      mask,        q_bias,      v_bias,      taps,
                                   bias,   out,  n[0], n[1],       n[2],        n[3],        n[4],        height,
                                   width,  n[7], strides(8), strides(11), strides(14), strides(17), Strides{0, n[20], n[21]},
                                   eps};
  try {
    attention.run(threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
