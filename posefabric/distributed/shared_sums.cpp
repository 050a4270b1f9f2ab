// Sums of arrays over the processes of one machine, through memory that they share.
//
// The memory: for each rank a line with its counter, then twice an array for each rank. In step n a
// rank writes its array into the half n % 2, says how large it is, and sets its counter to n. Nobody
// can write into a half that somebody still reads: that needs step n + 2, and whoever is there has
// seen all ranks arrive at n + 1, which they do after they have read n.

#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstring>

typedef long long Int;
typedef std::atomic<Int> Counter;
static_assert(Counter::is_always_lock_free, "a counter is shared between processes");

const Int LINE = 64;
// How a rank waits: it asks again at once, then lets others run, then sleeps, at last for longer:
// another rank may evaluate alone.
const int ASK = 2000;
const double YIELD_S = 0.002, LONG_S = 0.05;
const long SLEEP_NS = 50000, LONG_SLEEP_NS = 1000000;

struct Line {
  Counter step;
  Int kinds[2];  // of the halves' arrays: twice the bytes, and 1 of doubles
};
static_assert(sizeof(Line) <= LINE, "a rank's line");

static Line* line(char* memory, Int rank) { return (Line*)(memory + rank * LINE); }

static char* array(char* memory, Int ranks, Int room, Int rank, Int step) {
  return memory + ranks * LINE + ((step % 2) * ranks + rank) * room;
}

static double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

static inline void pause_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static bool arrives(const Counter* other, Int step, double patience) {
  for (int i = 0; i < ASK; ++i) {
    if (other->load(std::memory_order_acquire) >= step) return true;
    pause_a_little();
  }
  const double start = seconds();
  while (other->load(std::memory_order_acquire) < step) {
    const double waited = seconds() - start;
    if (waited > patience) return false;
    if (waited < YIELD_S) {
      sched_yield();
    } else {
      const timespec nap = {0, waited < LONG_S ? SLEEP_NS : LONG_SLEEP_NS};
      nanosleep(&nap, nullptr);
    }
  }
  return true;
}

// In the order of ranks, so that all have the same bits.
template <class R>
static void add_up(char* memory, Int ranks, Int room, Int step, R* sum, Int count) {
  for (Int rank = 0; rank < ranks; ++rank) {
    const R* own = (const R*)array(memory, ranks, room, rank, step);
    if (rank == 0) {
      std::memcpy(sum, own, count * sizeof(R));
      continue;
    }
    for (Int i = 0; i < count; ++i) sum[i] += own[i];
  }
}

// `room`, a multiple of 64, is what each array may take, in bytes.
extern "C" Int bytes(Int ranks, Int room) { return ranks * (LINE + 2 * room); }

extern "C" void give(char* memory, Int ranks, Int room, Int rank, Int step, const void* own,
                     Int size, Int is_double) {
  std::memcpy(array(memory, ranks, room, rank, step), own, size);
  line(memory, rank)->kinds[step % 2] = 2 * size + is_double;
  line(memory, rank)->step.store(step, std::memory_order_release);
}

// The sum of arrays of `size` bytes of doubles or floats. Comes back with -1, with -2 where a rank
// has given another kind of array, or with a rank that has not given its own after `patience`
// seconds.
extern "C" Int take(char* memory, Int ranks, Int room, Int own, Int step, void* sum, Int size,
                    Int is_double, double patience) {
  for (Int rank = 0; rank < ranks; ++rank)
    if (rank != own && !arrives(&line(memory, rank)->step, step, patience)) return rank;
  for (Int rank = 0; rank < ranks; ++rank)
    if (line(memory, rank)->kinds[step % 2] != 2 * size + is_double) return -2;
  if (is_double)
    add_up<double>(memory, ranks, room, step, (double*)sum, size / sizeof(double));
  else
    add_up<float>(memory, ranks, room, step, (float*)sum, size / sizeof(float));
  return -1;
}
