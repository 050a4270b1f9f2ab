// Sums of arrays over the processes of one machine, through memory that they share.
//
// The memory: for each rank a line with its counter, then twice an array for each rank. In step n a
// rank writes its array into the half n % 2, says how large it is, and sets its counter to n. Nobody
// can write into a half that somebody still reads: that needs step n + 2, and whoever is there has
// seen all ranks arrive at n + 1, which they do after they have read n.

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

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

// Of `count` numbers from `offset` bytes on. In the order of ranks, so that all have the same bits.
template <class R>
static void add_up(char* memory, Int ranks, Int room, Int step, Int offset, R* sum, Int count) {
  for (Int rank = 0; rank < ranks; ++rank) {
    const R* own = (const R*)(array(memory, ranks, room, rank, step) + offset);
    if (rank == 0) {
      std::memcpy(sum, own, count * sizeof(R));
      continue;
    }
    for (Int i = 0; i < count; ++i) sum[i] += own[i];
  }
}

// `room`, a multiple of 64, is what each array may take, in bytes.
extern "C" Int bytes(Int ranks, Int room) { return ranks * (LINE + 2 * room); }

// One rank's view of the memory. After `patience` seconds without a rank it asks whether to wait on,
// and says how often it has asked in this wait. Who answers nothing, since he was interrupted, means no.
struct Group {
  char* memory;
  Int ranks, room, rank, step;
  double patience;
  void (*ask)(Int rank, Int asked, int* waits_on);

  bool waits_on(Int missing, Int asked) const {
    int answer = 0;
    ask(missing, asked, &answer);
    return answer;
  }
};
const Int UNEQUAL = -2;  // a rank that has given another kind of array

static void say_given(const Group& group, Int size, Int is_double) {
  Line* mine = line(group.memory, group.rank);
  mine->kinds[group.step % 2] = 2 * size + is_double;
  mine->step.store(group.step, std::memory_order_release);
}

static bool all_given(const Group& group, Int size, Int is_double) {
  Int asked = 0;
  for (Int rank = 0; rank < group.ranks; ++rank)
    while (rank != group.rank &&
           !arrives(&line(group.memory, rank)->step, group.step, group.patience))
      if (!group.waits_on(rank, asked++)) return false;
  for (Int rank = 0; rank < group.ranks; ++rank)
    if (line(group.memory, rank)->kinds[group.step % 2] != 2 * size + is_double) {
      group.waits_on(UNEQUAL, asked);
      return false;
    }
  return true;
}

// Bytes of one array among several: where they lie there, and in the room.
struct Piece {
  Int array, begin, place, size;
};

// The next ones from an array's byte on, as many as the room takes.
static std::vector<Piece> next_pieces(Int room, const Int* sizes, Int count, Int array, Int begin) {
  std::vector<Piece> found;
  for (Int place = 0; array < count && place < room; ++array, begin = 0) {
    const Int size = std::min(sizes[array] - begin, room - place);
    found.push_back({array, begin, place, size});
    place += size;
  }
  return found;
}

// The sums of arrays of `sizes` bytes of doubles or floats, which may be written over what is
// given. Comes back with 0, or where waiting was given up.
extern "C" int add(Group* group, const char* const* given, char* const* sums, const Int* sizes,
                   Int count, Int is_double) {
  Int array_now = 0, begin = 0;
  while (array_now < count) {
    const auto pieces = next_pieces(group->room, sizes, count, array_now, begin);
    const Piece& last = pieces.back();
    ++group->step;
    char* own = array(group->memory, group->ranks, group->room, group->rank, group->step);
    for (const Piece& p : pieces) std::memcpy(own + p.place, given[p.array] + p.begin, p.size);
    say_given(*group, last.place + last.size, is_double);
    if (!all_given(*group, last.place + last.size, is_double)) return 1;
    for (const Piece& p : pieces) {
      char* sum = sums[p.array] + p.begin;
      if (is_double)
        add_up(group->memory, group->ranks, group->room, group->step, p.place, (double*)sum,
               p.size / (Int)sizeof(double));
      else
        add_up(group->memory, group->ranks, group->room, group->step, p.place, (float*)sum,
               p.size / (Int)sizeof(float));
    }
    array_now = last.array;
    begin = last.begin + last.size;
    if (begin == sizes[array_now]) ++array_now, begin = 0;
  }
  return 0;
}

extern "C" void add_doubles(void* group, double* values, Int count, int* done) {
  char* place = (char*)values;
  const Int size = count * sizeof(double);
  *done = !add((Group*)group, &place, &place, &size, 1, 1);
}
