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

}  // namespace simt
