// What XLA calls: checks sizes, divides the work among threads, chooses the instructions.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "panels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

const Instructions* chosen() {
  static const Instructions* const found = []() -> const Instructions* {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &avx2;
    return nullptr;
#elif defined(__aarch64__)
    return &neon;
#else
    return nullptr;
#endif
  }();
  return found;
}

const Format* found(const Instructions& set, std::string_view name) {
  for (int i = 0; i < set.count; i++)
    if (name == set.formats[i].name) return &set.formats[i];
  return nullptr;
}

// Runs f(0) to f(count - 1) on this thread and those of XLA, in any order. Parts are claimed, so a thread that comes
// late delays nobody, and the shared counters outlive the call.
template <class F>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const F& f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const F* work = &f;
  auto run = [shared, work, count] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      (*work)(i);
      shared->done.fetch_add(1, std::memory_order_acq_rel);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(decltype(run)(run));
  run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) != count; spins++)
    if (spins > 20000) std::this_thread::yield();
}

// Below this many bytes of weights, one thread is done before a second one has begun.
constexpr int64_t SMALL = 48 * 1024;

ffi::Error linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> panels,
                  ffi::ResultBuffer<ffi::F32> y, std::string_view format) {
  const Instructions* set = chosen();
  if (!set) return ffi::Error(ffi::ErrorCode::kUnimplemented, "This processor has none of the kernels' instructions.");
  const Format* kind = found(*set, format);
  if (!kind) return ffi::Error::InvalidArgument("The kernels have no such format.");
  const auto xs = x.dimensions(), ws = panels.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2)
    return ffi::Error::InvalidArgument("x and y must have 2 dimensions, panels 3.");
  const int64_t rows = xs[0], inputs = xs[1], count = ws[0], bytes = 16 * int64_t(kind->bytes);
  if (ws[2] != bytes || ws[1] > INT64_MAX / kind->size || ws[1] * kind->size != inputs || ys[0] != rows ||
      count > INT64_MAX / 16 || ys[1] != 16 * count || (!kind->exact && inputs % 32))
    return ffi::Error::InvalidArgument("The shapes of x, panels and y do not fit each other.");
  if (rows == 0 || count == 0) return ffi::Error::Success();
  std::vector<int8_t> codes;
  std::vector<float> scales, sums;
  if (!kind->exact) {
    codes.resize(rows * inputs * 2), scales.resize(rows * (inputs / 32)), sums.resize(rows * (inputs / 16));
  }
  const Activations activations{x.typed_data(), codes.data(), scales.data(), sums.data(), rows, inputs};
  if (!kind->exact) {
    if (rows < 16)
      for (int64_t row = 0; row < rows; row++) set->quantize(activations, row);
    else
      in_parallel(pool, rows, [&](int64_t row) { set->quantize(activations, row); });
  }
  const int64_t panel = ws[1] * bytes;
  // Parts of 128 KB, and not fewer than eight, so that threads end together.
  int64_t part = std::max<int64_t>(1, std::min(count / 8, (128 * 1024) / panel));
  if (count * panel * rows < SMALL) part = count;
  const int64_t parts = (count + part - 1) / part;
  in_parallel(pool, parts, [&](int64_t i) {
    // Rows in the middle loop: activations of a few rows stay in the nearest cache while panels stream by.
    for (int64_t from = 0; from < rows; from += 64)
      for (int64_t at = i * part; at < std::min(count, (i + 1) * part); at++)
        kind->product(panels.typed_data() + at * panel, activations, from, std::min(rows, from + 64),
                      y->typed_data() + 16 * at, 16 * count);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mistral_eqx_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("format"));

// The name of the instruction set in use; null without one.
extern "C" const char* mistral_eqx_instructions() { return chosen() ? chosen()->name : nullptr; }

// Whether there are products for a format.
extern "C" int mistral_eqx_has_format(const char* name) { return chosen() && found(*chosen(), name); }
