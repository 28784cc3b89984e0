// at::parallel_for without OpenMP, put in front of every file in a build for ThreadSanitizer.
// libgomp hands over between threads by futexes in code that is not instrumented, so that whatever
// one thread takes from another would look like a race. Here a loop starts its threads and joins
// them, which ThreadSanitizer follows.
#pragma once

#include <stdint.h>

namespace at::internal {
template <class F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f);
}

#define INTRA_OP_PARALLEL
#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

template <class F>
void at::internal::invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t count = at::get_num_threads();
  if (grain_size > 0) count = std::min(count, at::divup(end - begin, grain_size));
  const int64_t chunk = at::divup(end - begin, count);
  std::vector<std::exception_ptr> errors(count);
  const auto work = [&](int64_t id) {
    const int64_t first = begin + id * chunk;
    if (first >= end) return;
    try {
      ThreadIdGuard guard(id);
      f(first, std::min(end, first + chunk));
    } catch (...) {
      errors[id] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t id = 1; id < count; ++id) threads.emplace_back(work, id);
  work(0);
  for (auto& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}
