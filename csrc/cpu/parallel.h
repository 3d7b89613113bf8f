// parallel_for over independent tasks. The thread count is the caller's (torch's) and small work stays on one
// thread: a forked worker that torch runs with one thread never touches the OpenMP pool it inherited. Tasks
// are cut by the problem alone, never by the thread count, so results do not depend on it.
#pragma once
#include <cstdint>

namespace sage::cpu::SAGE_ISA {

template <class F>
inline void parallel_for(int64_t tasks, int threads, F&& task) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
#pragma omp parallel for schedule(static) num_threads(threads < tasks ? threads : int(tasks))
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
#endif
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace sage::cpu::SAGE_ISA
