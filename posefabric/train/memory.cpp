// A CPU allocator for a training's maps, which torch takes for large blocks.
//
// glibc serves a request at a multiple of 64 bytes as one of 96 bytes more, so that a block never
// fits where one of its own size was freed, and a training step holds half as much again as it
// needs. Here blocks are extents of pages in one reserved range: the smallest free extent that
// fits is cut, free neighbours join, and what was touched once stays with the process.

#include <c10/core/CPUAllocator.h>

#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr size_t kPage = 4096, kSmallest = 64 * 1024, kLine = 64;

class Extents final : public c10::Allocator {
 public:
  bool reserve(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return false;
    // Where the system has huge pages for who asks; elsewhere it does nothing.
    madvise(found, bytes, MADV_HUGEPAGE);
  base_ = static_cast<char*>(found);
    size_ = bytes;
    add_free(0, bytes);
    return true;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < kSmallest ? nullptr : take(bytes);
    if (block == nullptr) block = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  size_t live() {
    std::lock_guard<std::mutex> guard(mutex_);
    return live_;
  }

  std::mutex mutex_;

 private:
  static void give_back(void* block);

  void* take(size_t bytes) {
    if (bytes > size_) return nullptr;
    // A page more, for a start that differs between blocks: equal ones share their cache sets.
    const size_t length = (bytes + 2 * kPage - 1) / kPage * kPage;
    std::lock_guard<std::mutex> guard(mutex_);
    const auto best = by_size_.lower_bound({length, 0});
    if (best == by_size_.end()) return nullptr;
    const auto [had, start] = *best;
    remove_free(start, had);
    if (had > length) add_free(start + length, had - length);
    used_.emplace(start, length);
    live_ += length;
    turn_ = (turn_ + 1) % (kPage / kLine);
    return base_ + start + turn_ * kLine;
  }

  void release(size_t place) {
    std::lock_guard<std::mutex> guard(mutex_);
    size_t start = place / kPage * kPage;
    const auto found = used_.find(start);
    size_t length = found->second;
    live_ -= length;
    used_.erase(found);
    auto after = by_start_.lower_bound(start);
    if (after != by_start_.end() && after->first == start + length) {
      const size_t more = after->second;
      remove_free(start + length, more);
      length += more;
    }
    after = by_start_.lower_bound(start);
    if (after != by_start_.begin()) {
      const auto [before, had] = *std::prev(after);
      if (before + had == start) {
        remove_free(before, had);
        start = before;
        length += had;
      }
    }
    add_free(start, length);
  }

  void add_free(size_t start, size_t length) {
    by_start_.emplace(start, length);
    by_size_.emplace(length, start);
  }

  void remove_free(size_t start, size_t length) {
    by_start_.erase(start);
    by_size_.erase({length, start});
  }

  char* base_ = nullptr;
  size_t size_ = 0, live_ = 0, turn_ = 0;
  std::map<size_t, size_t> by_start_;            // free: start, length
  std::set<std::pair<size_t, size_t>> by_size_;  // free: length, start
  std::unordered_map<size_t, size_t> used_;      // start, length
};

// Never destroyed: tensors may outlive everything else.
Extents& extents() {
  static auto* made = new Extents;
  return *made;
}

void Extents::give_back(void* block) {
  Extents& own = extents();
  char* place = static_cast<char*>(block);
  if (place >= own.base_ && place < own.base_ + own.size_) {
    own.release(static_cast<size_t>(place - own.base_));
  } else {
    c10::GetDefaultCPUAllocator()->raw_deallocate(block);
  }
}

}  // namespace

extern "C" {

// Have torch take its large CPU blocks from here; 0 where the system reserves no such range.
int install() {
  const long machine = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  if (!extents().reserve(2 * static_cast<size_t>(machine))) return 0;
  // A process forked while another thread allocates must not inherit a locked list.
  pthread_atfork([] { extents().mutex_.lock(); }, [] { extents().mutex_.unlock(); },
                 [] { extents().mutex_.unlock(); });
  c10::SetCPUAllocator(&extents(), 0);
  return 1;
}

// Bytes of the blocks that are in use.
size_t live() { return extents().live(); }
}
