// Convolutions and products of small matrices as XLA custom calls for processors, each in three views: y of x and w, x
// of w and y, w of x and y.
//
// No convolution writes patches to memory. An output pixel is a sum over the kernel's taps of (channels at the tap) x
// (weights of the tap), kept in registers for several pixels and vectors of channels at a time; padded images stay in
// cache.
// Tensors are x [t, n, h, w, i], w [t, kh, kw, i, o], y [t, n, h2, w2, o], row-major: t convolutions at once. Those of
// a product are x [t, n, i], w [t, i, o], y [t, n, o], where one factor may be a single matrix that all t share.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Floats of a vector, and how many vectors of channels a tile holds at most.
#if defined(__AVX512F__)
constexpr int LANES = 16, WIDEST = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, WIDEST = 2;
#else
constexpr int LANES = 4, WIDEST = 2;
#endif
// Pixels (or rows of weights) of a tile `wide` vectors across: its sums, a row of weights and a broadcast fill the
// registers, and enough sums are under way to wait for none.
constexpr int tall(int wide) { return WIDEST == 2 ? (wide == 1 ? 8 : 6) : (wide == 4 ? 6 : 8); }
// Images are taken together until they have so many pixels, as tiles at the end of an image are not full.
constexpr int64_t PIXELS = 128;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));
inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs work(0), ..., work(units - 1), on threads of the pool and on this one. This one waits for units that others have
// begun and for no thread that has not, as all threads of the pool may stand here at once.
template <typename Work>
void share_out(ffi::ThreadPool& pool, int64_t units, double flop, const Work& work) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), units);
  if (threads < 2 || flop < 2e6) {
    for (int64_t unit = 0; unit < units; ++unit) work(unit);
    return;
  }
  struct State { std::atomic<int64_t> next{0}, done{0}; };
  auto state = std::make_shared<State>();
  auto run = [state, units, &work] {  // `work` is touched only with a unit in hand, while the caller still waits
    for (int64_t unit; (unit = state->next.fetch_add(1)) < units; state->done.fetch_add(1)) work(unit);
  };
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([run] { run(); });
  run();
  while (state->done.load() < units) std::this_thread::yield();
}

std::vector<float>& scratch() {
  static thread_local std::vector<float> buffer;
  return buffer;
}

// Images with zeros around them: `low` rows and columns before, `rows` and `columns` in all.
struct Padding {
  int64_t h, w, c, low_h, low_w, rows, columns;

  int64_t size() const { return rows * columns * c; }

  void operator()(const float* images, int64_t n, float* out) const {
    std::memset(out, 0, sizeof(float) * n * size());
    const int64_t take = std::min(w, columns - low_w);
    for (int64_t k = 0; k < n; ++k, images += h * w * c, out += size())
      for (int64_t r = 0; r < h && r + low_h < rows; ++r)
        std::memcpy(out + ((r + low_h) * columns + low_w) * c, images + r * w * c, sizeof(float) * take * c);
  }
};

// A tap: where it looks, from a pixel's base, and which of the kernel's matrices it multiplies by.
struct Tap { int64_t offset, matrix; };

// Pixels that look at the source through the same taps: their bases there, and where in an image they are written.
struct Phase {
  std::vector<Tap> taps;
  std::vector<int64_t> bases, places;

  // The same for so many images, one after another.
  void repeat(int64_t images, int64_t source, int64_t pixels) {
    const size_t count = bases.size();
    for (int64_t k = 1; k < images; ++k)
      for (size_t p = 0; p < count; ++p) {
        bases.push_back(bases[p] + k * source);
        places.push_back(places[p] + k * pixels);
      }
  }
};

// sum[p][j] += at(p) x row(j), for every pixel (or row of a matrix) p of a tile: the innermost loop of all kernels.
template <int TALL, int WIDE, typename Row, typename At>
inline __attribute__((always_inline)) void add_row(Vector (&sum)[TALL][WIDE], const Row& row, const At& at) {
  Vector v[WIDE];
#pragma GCC unroll 8
  for (int j = 0; j < WIDE; ++j) v[j] = row(j);
#pragma GCC unroll 8
  for (int p = 0; p < TALL; ++p)
#pragma GCC unroll 8
    for (int j = 0; j < WIDE; ++j) sum[p][j] += at(p) * v[j];
}

// Sums over taps of source[base + offset, depth] x weights [matrix, depth, block], for as many bases as a tile is tall.
template <int WIDE>
void gather_product(const float* source, const int64_t* bases, const std::vector<Tap>& taps, int64_t depth,
                    const float* weights, Vector (&sum)[tall(WIDE)][WIDE]) {
  constexpr int TALL = tall(WIDE);
  Vector s[TALL][WIDE] = {};
  for (const Tap& tap : taps) {
    const float* at[TALL];
    for (int p = 0; p < TALL; ++p) at[p] = source + bases[p] + tap.offset;
    const float* row = weights + tap.matrix * depth * WIDE * LANES;
    for (int64_t d = 0; d < depth; ++d, row += WIDE * LANES)
      add_row(s, [&](int j) { return load(row + j * LANES); }, [&](int p) { return at[p][d]; });
  }
  std::memcpy(sum, s, sizeof(s));
}

// [matrices, depth, block] of the channels from `first` on, zeros past the last; `turned`: of transposed matrices.
void pack(const float* w, int64_t matrices, int64_t depth, int64_t channels, int64_t first, int64_t block, bool turned,
          float* packed) {
  const int64_t width = std::min(block, channels - first);
  if (width < block) std::memset(packed, 0, sizeof(float) * matrices * depth * block);
  for (int64_t m = 0; m < matrices; ++m, w += depth * channels, packed += depth * block)
    if (turned)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t d = 0; d < depth; ++d) packed[d * block + j] = w[(first + j) * depth + d];
    else
      for (int64_t d = 0; d < depth; ++d)
        std::memcpy(packed + d * block, w + d * channels + first, sizeof(float) * width);
}

// out[t, n, place, channel]: gather products over the padded images of `source`, all phases of them.
template <int WIDE>
void convolve(ffi::ThreadPool& pool, const float* source, int64_t t, int64_t n, const Padding& padding,
              std::vector<Phase> phases, const float* weights, int64_t matrices, int64_t channels, bool turned,
              int64_t pixels, float* out) {
  constexpr int TALL = tall(WIDE);
  constexpr int64_t BLOCK = WIDE * LANES;
  const int64_t depth = padding.c, blocks = ceil_div(channels, BLOCK), size = matrices * depth * BLOCK;
  std::vector<float> packed;
  if (turned || channels != BLOCK) {
    packed.resize(t * blocks * size);
    for (int64_t k = 0; k < t * blocks; ++k)
      pack(weights + k / blocks * matrices * depth * channels, matrices, depth, channels, k % blocks * BLOCK, BLOCK,
           turned, packed.data() + k * size);
    weights = packed.data();
  }
  const int64_t together = std::min(n, ceil_div(PIXELS, pixels)), groups = ceil_div(n, together);
  for (Phase& phase : phases) phase.repeat(together, padding.size(), pixels);
  share_out(pool, t * groups, 2.0 * t * n * pixels * matrices * depth * channels, [&](int64_t unit) {
    const int64_t task = unit / groups, first = task * n + unit % groups * together;
    const int64_t images = std::min(together, (task + 1) * n - first);
    std::vector<float>& padded = scratch();
    padded.resize(images * padding.size());
    padding(source + first * padding.h * padding.w * depth, images, padded.data());
    float* result = out + first * pixels * channels;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* own = weights + (task * blocks + block) * size;
      const int64_t width = std::min(BLOCK, channels - block * BLOCK);
      for (const Phase& phase : phases) {
        const int64_t count = phase.bases.size() / together * images;
        for (int64_t tile = 0; tile < count; tile += TALL) {
          // A last tile that is not full computes its last pixel more than once.
          int64_t bases[TALL];
          for (int64_t p = 0; p < TALL; ++p) bases[p] = phase.bases[std::min(tile + p, count - 1)];
          Vector sum[TALL][WIDE];
          gather_product<WIDE>(padded.data(), bases, phase.taps, depth, own, sum);
          for (int64_t p = 0; p < TALL && tile + p < count; ++p)
            std::memcpy(result + phase.places[tile + p] * channels + block * BLOCK, sum[p], sizeof(float) * width);
        }
      }
    }
  });
}

// Rows of the weights' gradient, each a channel at a tap, against a block of filters, added up over `count` pixels.
template <int WIDE>
void outer_product(const float* source, const int64_t* bases, int64_t count, const int64_t* offsets, const float* y,
                   int64_t stride, float* sums) {
  constexpr int TALL = tall(WIDE);
  Vector s[TALL][WIDE] = {};
  for (int64_t p = 0; p < count; ++p, y += stride) {
    const float* at = source + bases[p];
    add_row(s, [&](int j) { return load(y + j * LANES); }, [&](int k) { return at[offsets[k]]; });
  }
  for (int k = 0; k < TALL; ++k)
    for (int j = 0; j < WIDE; ++j) {
      float* to = sums + k * stride + j * LANES;
      store(to, load(to) + s[k][j]);
    }
}

// w[t, row, filter]: outer products of what each row sees of the padded images and y, over all pixels.
template <int WIDE>
void correlate(ffi::ThreadPool& pool, const float* x, const float* y, int64_t t, int64_t n, const Padding& padding,
               Phase pixels_seen, std::vector<int64_t> offsets, int64_t filters, float* w) {
  constexpr int64_t TALL = tall(WIDE), BLOCK = WIDE * LANES;
  const int64_t pixels = pixels_seen.bases.size(), stride = ceil_div(filters, BLOCK) * BLOCK;
  const int64_t rows = offsets.size(), tiles = ceil_div(rows, TALL);
  const int64_t together = std::min(n, ceil_div(PIXELS, pixels));
  offsets.resize(tiles * TALL, 0);
  pixels_seen.repeat(together, padding.size(), pixels);
  // Every part has rows of its own: the order of each sum, and its last bit, is the same on any number of threads.
  const int64_t parts = std::min<int64_t>(tiles, std::max<int64_t>(pool.num_threads(), 1));
  share_out(pool, t * parts, 2.0 * t * n * pixels * rows * filters, [&](int64_t unit) {
    const int64_t task = unit / parts, part = unit % parts, begin = tiles * part / parts;
    const int64_t end = tiles * (part + 1) / parts;
    const int64_t x_size = together * padding.size(), y_size = stride == filters ? 0 : together * pixels * stride;
    std::vector<float>& buffer = scratch();
    buffer.assign(x_size + y_size + (end - begin) * TALL * stride, 0.0f);
    float *padded = buffer.data(), *wide = padded + x_size, *sums = wide + y_size;
    for (int64_t first = task * n; first < (task + 1) * n; first += together) {
      const int64_t images = std::min(together, (task + 1) * n - first), count = images * pixels;
      padding(x + first * padding.h * padding.w * padding.c, images, padded);
      const float* own = y + first * pixels * filters;
      if (y_size) {
        for (int64_t p = 0; p < count; ++p) std::memcpy(wide + p * stride, own + p * filters, sizeof(float) * filters);
        own = wide;
      }
      for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t block = 0; block < stride; block += BLOCK)
          outer_product<WIDE>(padded, pixels_seen.bases.data(), count, offsets.data() + tile * TALL, own + block,
                              stride, sums + (tile - begin) * TALL * stride + block);
    }
    for (int64_t row = begin * TALL; row < std::min(end * TALL, rows); ++row)
      std::memcpy(w + (task * rows + row) * filters, sums + (row - begin * TALL) * stride, sizeof(float) * filters);
  });
}

// Calls f with a tile's vectors across, so that `channels` fill whole tiles as well as they can.
template <typename F>
void with_width(int64_t channels, const F& f) {
  const int64_t vectors = ceil_div(channels, LANES), wide = ceil_div(vectors, ceil_div(vectors, WIDEST));
  if (wide <= 1) f(std::integral_constant<int, 1>());
  else if (wide == 2) f(std::integral_constant<int, 2>());
  else if (wide == 3) f(std::integral_constant<int, std::min(3, WIDEST)>());
  else f(std::integral_constant<int, WIDEST>());
}

using Tensor = ffi::Buffer<ffi::F32>;

// What the outputs see of the padded image [h, w, c] through a kernel.
Phase seen_by_outputs(int64_t kh, int64_t kw, int64_t h2, int64_t w2, int64_t stride, const Padding& padding) {
  Phase phase;
  for (int64_t i = 0; i < kh; ++i)
    for (int64_t j = 0; j < kw; ++j) phase.taps.push_back({(i * padding.columns + j) * padding.c, i * kw + j});
  for (int64_t r = 0; r < h2; ++r)
    for (int64_t c = 0; c < w2; ++c) {
      phase.places.push_back(r * w2 + c);
      phase.bases.push_back((r * padding.columns + c) * stride * padding.c);
    }
  return phase;
}

ffi::Error output(ffi::ThreadPool pool, Tensor x, Tensor w, ffi::ResultBuffer<ffi::F32> y, int64_t stride,
                  int64_t low_h, int64_t low_w) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  const Padding padding{xs[2], xs[3], xs[4], low_h, low_w, (ys[2] - 1) * stride + ws[1], (ys[3] - 1) * stride + ws[2]};
  const Phase phase = seen_by_outputs(ws[1], ws[2], ys[2], ys[3], stride, padding);
  with_width(ys[4], [&](auto wide) {
    convolve<wide>(pool, x.typed_data(), xs[0], xs[1], padding, {phase}, w.typed_data(), ws[1] * ws[2], ys[4], false,
                   ys[2] * ys[3], y->typed_data());
  });
  return ffi::Error::Success();
}

// An input pixel that is `a` rows past a multiple of the stride was met by the kernel's rows a, a + stride, ...
ffi::Error input(ffi::ThreadPool pool, Tensor w, Tensor y, ffi::ResultBuffer<ffi::F32> x, int64_t stride, int64_t low_h,
                 int64_t low_w) {
  const auto xs = x->dimensions(), ws = w.dimensions(), ys = y.dimensions();
  const int64_t before_h = (ws[1] - 1) / stride, before_w = (ws[2] - 1) / stride;
  const Padding padding{ys[2], ys[3], ys[4], before_h, before_w,
                        before_h + std::max((xs[2] - 1 + low_h) / stride + 1, ys[2]),
                        before_w + std::max((xs[3] - 1 + low_w) / stride + 1, ys[3])};
  std::vector<Phase> phases(stride * stride);
  for (int64_t i = 0; i < ws[1]; ++i)
    for (int64_t j = 0; j < ws[2]; ++j)
      phases[i % stride * stride + j % stride].taps.push_back(
          {-(i / stride * padding.columns + j / stride) * padding.c, i * ws[2] + j});
  for (int64_t r = 0; r < xs[2]; ++r)
    for (int64_t c = 0; c < xs[3]; ++c) {
      Phase& phase = phases[(r + low_h) % stride * stride + (c + low_w) % stride];
      phase.places.push_back(r * xs[3] + c);
      phase.bases.push_back(
          (((r + low_h) / stride + before_h) * padding.columns + (c + low_w) / stride + before_w) * padding.c);
    }
  with_width(xs[4], [&](auto wide) {
    convolve<wide>(pool, y.typed_data(), ys[0], ys[1], padding, phases, w.typed_data(), ws[1] * ws[2], xs[4], true,
                   xs[2] * xs[3], x->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error weights(ffi::ThreadPool pool, Tensor x, Tensor y, ffi::ResultBuffer<ffi::F32> w, int64_t stride,
                   int64_t low_h, int64_t low_w) {
  const auto xs = x.dimensions(), ws = w->dimensions(), ys = y.dimensions();
  const Padding padding{xs[2], xs[3], xs[4], low_h, low_w, (ys[2] - 1) * stride + ws[1], (ys[3] - 1) * stride + ws[2]};
  const Phase phase = seen_by_outputs(ws[1], ws[2], ys[2], ys[3], stride, padding);
  std::vector<int64_t> offsets;
  for (const Tap& tap : phase.taps)
    for (int64_t c = 0; c < xs[4]; ++c) offsets.push_back(tap.offset + c);
  with_width(ys[4], [&](auto wide) {
    correlate<wide>(pool, x.typed_data(), y.typed_data(), xs[0], xs[1], padding, phase, offsets, ys[4],
                    w->typed_data());
  });
  return ffi::Error::Success();
}

// -------------------------------------------------------------------------------------- products of small matrices

// How a factor's matrices lie: one after another `size` apart (0: all the same one), their rows and columns so far.
struct Factor {
  const float* data;
  int64_t size, row, column;
};

// c [rows, width] at `columns`: a times b, whose rows are `stride` apart; a's rows TALL at a time.
template <int TALL, int WIDE>
void tile_product(const Factor& a, int64_t rows, int64_t depth, const float* b, int64_t stride,
                  const int64_t (&columns)[WIDE], int64_t width, float* c) {
  for (int64_t first = 0; first < rows; first += TALL) {
    // A last tile that is not full computes its last row more than once.
    const float* at[TALL];
    for (int64_t p = 0; p < TALL; ++p) at[p] = a.data + std::min(first + p, rows - 1) * a.row;
    Vector s[TALL][WIDE] = {};
    const float* line = b;
    for (int64_t d = 0; d < depth; ++d, line += stride)
      add_row(s, [&](int j) { return load(line + columns[j]); }, [&](int p) { return at[p][d * a.column]; });
    for (int64_t p = 0; p < TALL && first + p < rows; ++p)
      for (int j = 0; j < WIDE; ++j) {
        float* to = c + (first + p) * width + columns[j];
        if (width >= LANES) store(to, s[p][j]);
        else
          for (int64_t k = 0; k < width; ++k) to[k] = s[p][j][k];
      }
  }
}

// c [rows, width] = a [rows, depth] x b [depth, width]; b's rows are contiguous, and `spare` holds depth vectors.
void multiply(const Factor& a, int64_t rows, int64_t depth, const float* b, int64_t width, float* spare, float* c) {
  int64_t stride = width;
  if (width < LANES) {
    std::memset(spare, 0, sizeof(float) * depth * LANES);
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t j = 0; j < width; ++j) spare[d * LANES + j] = b[d * width + j];
    b = spare, stride = LANES;
  }
  const auto waste = [rows](int64_t tall) { return ceil_div(rows, tall) * tall - rows; };
  for (int64_t first = 0; first < width; first += WIDEST * LANES)
    with_width(std::min<int64_t>(width - first, WIDEST * LANES), [&](auto wide) {
      // The last vector of a row overlaps the one before it rather than reach past the end.
      int64_t columns[wide];
      for (int64_t j = 0; j < wide; ++j) columns[j] = std::max<int64_t>(std::min(first + j * LANES, width - LANES), 0);
      if (rows == 1) tile_product<1, wide>(a, rows, depth, b, stride, columns, width, c);
      else if (waste(5) < waste(tall(wide))) tile_product<5, wide>(a, rows, depth, b, stride, columns, width, c);
      else tile_product<tall(wide), wide>(a, rows, depth, b, stride, columns, width, c);
    });
}

// c [rows, width] = a b', few rows of each and what is summed long: vectors lie along that, and are added up at the end.
void dots(const float* a, int64_t rows, int64_t depth, const float* b, int64_t width, float* c) {
  constexpr int SIDE = WIDEST == 2 ? 3 : 5;
  const int64_t whole = depth / LANES * LANES;
  for (int64_t r = 0; r < rows; r += SIDE)
    for (int64_t k = 0; k < width; k += SIDE) {
      const float *left[SIDE], *right[SIDE];
      for (int64_t i = 0; i < SIDE; ++i) {
        left[i] = a + std::min(r + i, rows - 1) * depth;
        right[i] = b + std::min(k + i, width - 1) * depth;
      }
      Vector s[SIDE][SIDE] = {};
      for (int64_t d = 0; d < whole; d += LANES)
        add_row(s, [&](int j) { return load(right[j] + d); }, [&](int p) { return load(left[p] + d); });
      for (int64_t p = 0; p < SIDE && r + p < rows; ++p)
        for (int64_t j = 0; j < SIDE && k + j < width; ++j) {
          float sum = 0;
          for (int64_t d = whole; d < depth; ++d) sum += left[p][d] * right[j][d];
          for (int lane = 0; lane < LANES; ++lane) sum += s[p][j][lane];
          c[(r + p) * width + k + j] = sum;
        }
    }
}

// out [columns, rows] of in [rows, columns], by squares of four.
void transpose(const float* in, int64_t rows, int64_t columns, float* out) {
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  // The first and the last halves of two vectors, and of their pairs: compilers make one instruction of each.
  const auto first = [](Four a, Four b) { return Four{a[0], b[0], a[1], b[1]}; };
  const auto last = [](Four a, Four b) { return Four{a[2], b[2], a[3], b[3]}; };
  const auto first_pairs = [](Four a, Four b) { return Four{a[0], a[1], b[0], b[1]}; };
  const auto last_pairs = [](Four a, Four b) { return Four{a[2], a[3], b[2], b[3]}; };
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < columns; c += 4) {
      if (r + 4 > rows || c + 4 > columns) {
        for (int64_t i = r; i < std::min(r + 4, rows); ++i)
          for (int64_t j = c; j < std::min(c + 4, columns); ++j) out[j * rows + i] = in[i * columns + j];
        continue;
      }
      const auto row = [&](int k) { return *reinterpret_cast<const Four*>(in + (r + k) * columns + c); };
      const auto put = [&](int k, Four v) { *reinterpret_cast<Four*>(out + (c + k) * rows + r) = v; };
      const Four a = first(row(0), row(1)), b = last(row(0), row(1));
      const Four d = first(row(2), row(3)), e = last(row(2), row(3));
      put(0, first_pairs(a, d));
      put(1, last_pairs(a, d));
      put(2, first_pairs(b, e));
      put(3, last_pairs(b, e));
    }
}

// Task after task, c = a b; `turned`: of the transposed matrices of b.
ffi::Error multiply_all(ffi::ThreadPool& pool, const Factor& a, const Factor& b, bool turned, int64_t tasks,
                        int64_t rows, int64_t depth, int64_t width, float* c) {
  share_out(pool, tasks, 2.0 * tasks * rows * depth * width, [&](int64_t task) {
    std::vector<float>& spare = scratch();
    spare.resize(depth * (LANES + width));
    const float* own = b.data + task * b.size;
    if (turned && a.column == 1 && width < LANES && depth >= 4 * LANES)
      return dots(a.data + task * a.size, rows, depth, own, width, c + task * rows * width);
    if (turned) {
      transpose(own, width, depth, spare.data() + depth * LANES);
      own = spare.data() + depth * LANES;
    }
    multiply({a.data + task * a.size, 0, a.row, a.column}, rows, depth, own, width, spare.data(),
             c + task * rows * width);
  });
  return ffi::Error::Success();
}

// The factor's matrices by rows, or turned.
Factor factor(const Tensor& tensor, bool turned = false) {
  const auto size = tensor.dimensions();
  return {tensor.typed_data(), size[0] == 1 ? 0 : size[1] * size[2], turned ? 1 : size[2], turned ? size[2] : 1};
}

ffi::Error product_output(ffi::ThreadPool pool, Tensor x, Tensor w, ffi::ResultBuffer<ffi::F32> y) {
  const auto size = y->dimensions();
  return multiply_all(pool, factor(x), factor(w), false, size[0], size[1], x.dimensions()[2], size[2],
                      y->typed_data());
}

ffi::Error product_input(ffi::ThreadPool pool, Tensor w, Tensor y, ffi::ResultBuffer<ffi::F32> x) {
  const auto size = x->dimensions();
  return multiply_all(pool, factor(y), factor(w), true, size[0], size[1], y.dimensions()[2], size[2], x->typed_data());
}

ffi::Error product_weights(ffi::ThreadPool pool, Tensor x, Tensor y, ffi::ResultBuffer<ffi::F32> w) {
  const auto size = w->dimensions();
  // A single column is a single row turned, and rows are what vectors lie along.
  if (size[2] == 1)
    return multiply_all(pool, factor(y, true), factor(x), false, size[0], 1, x.dimensions()[1], size[1],
                        w->typed_data());
  return multiply_all(pool, factor(x, true), factor(y), false, size[0], size[1], x.dimensions()[1], size[2],
                      w->typed_data());
}

}  // namespace

#define METAPRIOR_BINDING ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Tensor>().Arg<Tensor>().Ret<Tensor>()
#define METAPRIOR_CONV(name, function)             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,    \
                                METAPRIOR_BINDING  \
                                    .Attr<int64_t>("stride") \
                                    .Attr<int64_t>("low_h")  \
                                    .Attr<int64_t>("low_w"))

METAPRIOR_CONV(metaprior_conv_y, output);
METAPRIOR_CONV(metaprior_conv_x, input);
METAPRIOR_CONV(metaprior_conv_w, weights);
XLA_FFI_DEFINE_HANDLER_SYMBOL(metaprior_product_y, product_output, METAPRIOR_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(metaprior_product_x, product_input, METAPRIOR_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(metaprior_product_w, product_weights, METAPRIOR_BINDING);
