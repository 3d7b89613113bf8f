// The emulator behind the shim headers: runs a CUDA kernel's blocks one after another on the CPU, a fiber a thread.
//
// A fiber runs until it meets a barrier, then another one is picked, by an order that the caller sets: lowest first (warp
// 0 runs as far ahead as barriers let it), highest first, or at random from a seed. Blocks are taken in the same order. So
// a barrier that is missing shows as a difference between orders. Shared memory is allocated for each block to the byte
// and filled with NaN bits; barriers that not all threads reach are errors.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace simt {

struct Index { unsigned x = 0, y = 0, z = 0; };

constexpr int kMaxThreads = 1024;
enum Barrier : int { kNone, kBlock, kWarp, kShuffle, kVote };

// Lowest first, highest first, or (2 and more) random from this seed.
void set_order(int order);
int64_t launches();  // kernels run so far
int64_t switches();  // fibers entered so far
int64_t allocations();  // of device and of pinned memory, so far

void run(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- called on a fiber
void wait(Barrier kind, unsigned mask);
uint64_t exchange(Barrier kind, unsigned mask, uint64_t mine, int source_lane);  // every lane's word to every lane
unsigned ballot(unsigned mask, bool mine);
void* shared_memory();
int lane();
[[noreturn]] void fail(const char* message);

// ---- for races.cpp, which sees every access of a build with races=True
struct Now {
  int64_t launch = 0, block = 0;
  uint64_t launch_stamp = 0, block_stamp = 0;  // of one count, which goes up with every launch and every block
  int thread = -1;
  uint32_t block_epoch = 0, warp_epoch[kMaxThreads / 32] = {};  // barriers passed since the block began
  char *shared = nullptr, *stacks = nullptr;
  size_t shared_bytes = 0, stack_bytes = 0;
};
extern Now now;
std::string place_of(const void* p);      // in words
void preempt();                           // another fiber may come first, from a fiber
[[noreturn]] void stop(const char* why);  // ends the launch with an error, from code that cannot throw

// Collect: races are listed, once for each pair of places in the code, and the launch goes on; else the first is an error.
// One in so many accesses lets another fiber come first; 0: none.
void detect(bool collect, uint32_t preempt_one_in, uint64_t seed);
std::vector<std::string> races();
int64_t accesses();  // seen so far

}  // namespace simt
