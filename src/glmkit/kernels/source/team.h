// The threads of one call, seen from one of them: they share out the work of one stage after another.
//
//     stage 0        |wait|  stage 1      |wait|  stage 2 ...        one parallel region for all, a barrier after each
//     0 1 1 0 0 1 .. |    |  1 0 0 1 ...  |    |                     who takes the next items is whoever is free
//
// Which thread computes an item changes nothing in it, so results do not depend on how many there are.

#pragma once

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace glm {

// The number of the next item of a stage, alone in its line of the cache.
struct alignas(64) Counter {
    std::atomic<int> next{0};
};

class Team {
  public:
    Team(int thread, int threads, Counter* counters) : thread(thread), threads(threads), counters(counters) {}

    // Calls work(first, last) until all items are done, `grain` or fewer at a time, and waits for the others.
    template <class Work>
    void share(int items, int grain, Work work) {
        if (threads == 1) {
            for (int first = 0; first < items; first += grain) work(first, std::min(first + grain, items));
            return;
        }
        std::atomic<int>& next = (counters++)->next;
        for (int first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < items;) {
            work(first, std::min(first + grain, items));
        }
#pragma omp barrier
    }

    const int thread, threads;

  private:
    Counter* counters;
};

// Calls body(team) in each of so many threads; `counters` has one for each stage.
template <class Body>
void with_team(int threads, Counter* counters, Body body) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(Team(omp_get_thread_num(), omp_get_num_threads(), counters));
        return;
    }
#endif
    body(Team(0, 1, counters));
}

}  // namespace glm
