// Race detection, in a build with races=True: what g++ -fsanitize=thread calls before every access, in its library's place.
//
// Each word of memory that kernels touch, but for their stacks, has a shadow: who wrote it last, and who has read it since.
// Two accesses by different threads, one of them a write, need something between them that orders memory, whatever order the
// emulator happened to run them in: __syncthreads() orders the threads of its block, __syncwarp() the lanes of its warp.
// Shuffles and votes order nothing, nor do blocks of one launch. Launches are ordered.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include "cuda_runtime.h"

namespace simt {
namespace {

struct Access {
  uint32_t block = 0;
  int32_t thread = -1;  // -1: none
  uint32_t block_epoch = 0, warp_epoch = 0;
  uintptr_t pc = 0;
  bool there() const { return thread >= 0; }
  bool same_block(const Access& b) const { return block == b.block; }
  bool same_warp(const Access& b) const { return same_block(b) && thread / 32 == b.thread / 32; }
  bool before(const Access& now) const {  // whether something orders this one, which came first, before `now`
    if (!same_block(now)) return false;
    if (thread == now.thread || block_epoch != now.block_epoch) return true;
    return same_warp(now) && warp_epoch != now.warp_epoch;
  }
};

// Of the readers since the last write, two that are as far apart as any (of different blocks, else warps, else lanes) tell as
// much as all of them: whoever may write after both may write after the others.
struct Cell {
  Access write, read[2];

  // Whether the access races, and then with whom.
  bool reads(const Access& now, Access& other, bool& wrote) {
    const bool raced = write.there() && !write.before(now);
    if (raced) other = write, wrote = true;
    for (Access& r : read)
      if (r.there() && r.before(now)) r = Access{};
    if (!read[0].there()) std::swap(read[0], read[1]);
    if (!read[0].there()) read[0] = now;
    else if (!read[1].there() || far(read[0], now) > far(read[0], read[1])) read[1] = now;
    return raced;
  }
  bool writes(const Access& now, Access& other, bool& wrote) {
    bool raced = false;
    for (const Access* a : {&read[1], &read[0], &write})
      if (a->there() && !a->before(now)) other = *a, wrote = a == &write, raced = true;
    write = now, read[0] = read[1] = Access{};
    return raced;
  }
  static int far(const Access& a, const Access& b) { return a.same_warp(b) ? 0 : a.same_block(b) ? 1 : 2; }
};

struct Word {  // 4 bytes, as one until something narrower comes
  uint64_t stamp = 0;  // of the launch, or of the block where the memory is shared: what is older is ordered
  Cell cell;
  std::unique_ptr<Cell[]> bytes;
};
constexpr uintptr_t kPage = 1024;
struct Page { Word words[kPage / 4]; };

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct Recent {
  uintptr_t number = 0;
  Page* page = nullptr;
} recent[64];
bool collecting = false;
uint32_t preempt_one_in = 0;
int64_t seen = 0;
uint64_t random_state = 1;
std::set<std::pair<uintptr_t, uintptr_t>> reported;
std::vector<std::string> found;

Page& page_of(uintptr_t at) {
  const uintptr_t number = at / kPage;
  Recent& r = recent[number % 64];
  if (r.number != number || !r.page) {
    auto& p = pages[number];
    if (!p) p = std::make_unique<Page>();
    r = {number, p.get()};
  }
  return *r.page;
}

std::string source_of(uintptr_t pc) {  // file:line, and through what it was inlined
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(pc), &info) || !info.dli_fname) return "?";
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' %#zx 2>/dev/null", info.dli_fname,
                size_t(pc - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  std::string lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, "\n (")] = 0;
      lines += (lines.empty() ? "" : " in ") + std::string(line);
    }
    pclose(pipe);
  }
  return lines.empty() ? "?" : lines;
}

std::string text_of(const Access& a, const char* does) {
  char line[120];
  std::snprintf(line, sizeof line, "thread %d of block %u (its syncs: block %u, warp %u) %s at ", a.thread, a.block,
                a.block_epoch, a.warp_epoch, does);
  return line + source_of(a.pc);
}

void report(uintptr_t at, const Access& first, bool first_wrote, const Access& second, bool second_writes) {
  if (collecting && !reported.insert({first.pc, second.pc}).second) return;
  const std::string text = "race in launch " + std::to_string(now.launch) + " on " + place_of(reinterpret_cast<void*>(at)) +
                           ": " + text_of(first, first_wrote ? "wrote" : "read") + ", " +
                           text_of(second, second_writes ? "writes" : "reads") + ", and nothing orders the two";
  if (collecting) found.push_back(text);
  else stop(text.c_str());
}

void touch(Cell& cell, uintptr_t at, const Access& me, bool write) {
  Access other;
  bool wrote = false;
  if (write ? cell.writes(me, other, wrote) : cell.reads(me, other, wrote)) report(at, other, wrote, me, write);
}

bool within(const void* p, const char* from, size_t bytes) {
  return static_cast<const char*>(p) >= from && static_cast<const char*>(p) < from + bytes;
}

void access(void* p, size_t bytes, bool write, void* pc) {
  if (!within(__builtin_frame_address(0), now.stacks, now.stack_bytes)) return;  // the host's code, of whatever thread
  if (within(p, now.stacks, now.stack_bytes)) return;
  for (const Index* i : {&threadIdx, &blockIdx, &blockDim, &gridDim})
    if (within(p, reinterpret_cast<const char*>(i), sizeof *i)) return;
  ++seen;
  if (preempt_one_in) {
    random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
    if (random_state * 2685821657736338717ull >> 32 < (uint64_t(1) << 32) / preempt_one_in) preempt();
  }
  const int thread = now.thread;
  const Access me = {uint32_t(now.block), thread, now.block_epoch, now.warp_epoch[thread / 32],
                     reinterpret_cast<uintptr_t>(pc)};
  const uint64_t stamp = within(p, now.shared, now.shared_bytes) ? now.block_stamp : now.launch_stamp;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t at = begin; at < end;) {
    Word& word = page_of(at).words[at % kPage / 4];
    if (word.stamp != stamp) word.stamp = stamp, word.cell = Cell{}, word.bytes.reset();
    const uintptr_t next = std::min(end, at / 4 * 4 + 4);
    if (next - at < 4 && !word.bytes) {
      word.bytes = std::make_unique<Cell[]>(4);
      for (int k = 0; k < 4; ++k) word.bytes[k] = word.cell;
    }
    if (!word.bytes) {
      touch(word.cell, at, me, write);
      at = next;
    } else {
      for (; at < next; ++at) touch(word.bytes[at % 4], at, me, write);
    }
  }
}

}  // namespace

void detect(bool collect, uint32_t one_in, uint64_t seed) {
  collecting = collect, preempt_one_in = one_in, random_state = seed * 0x9e3779b97f4a7c15ull + 1;
  reported.clear(), found.clear();
  std::fill(std::begin(recent), std::end(recent), Recent{});
  pages.clear();
}
std::vector<std::string> races() { return found; }
int64_t accesses() { return seen; }

}  // namespace simt

// ------------------------------------------------------------------------------------------------------------- the hooks
#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define PC __builtin_return_address(0)
#define HOOKS(n)                                                              \
  HOOK __tsan_read##n(void* p) { simt::access(p, n, false, PC); }             \
  HOOK __tsan_write##n(void* p) { simt::access(p, n, true, PC); }             \
  HOOK __tsan_unaligned_read##n(void* p) { simt::access(p, n, false, PC); }   \
  HOOK __tsan_unaligned_write##n(void* p) { simt::access(p, n, true, PC); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
HOOK __tsan_read_range(void* p, size_t bytes) { simt::access(p, bytes, false, PC); }
HOOK __tsan_write_range(void* p, size_t bytes) { simt::access(p, bytes, true, PC); }
HOOK __tsan_vptr_update(void**, void*) {}
HOOK __tsan_vptr_read(void**) {}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
