#include "cuda_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
Now now;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 128 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

// ------------------------------------------------------------------------------------------------ context switch
#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
struct Context {
  void* sp = nullptr;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack - 64);
    *--top = nullptr;  // entry's return address: it never returns; keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp = top;
  }
};
void switch_context(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t u;
  void start(char* stack, void (*entry)()) {
    getcontext(&u);
    u.uc_stack.ss_sp = stack;
    u.uc_stack.ss_size = kStack;
    u.uc_link = nullptr;
    makecontext(&u, entry, 0);
  }
};
void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
#endif

// --------------------------------------------------------------------------------------------------- one block
struct Warp {
  uint32_t runnable = 0, finished = 0, waiting = 0, at_block = 0;
  Barrier kind = kNone;
  unsigned mask = 0;
  int generation = 0;
  uint64_t slot[2][32];
};

struct State {
  int order = 0;
  uint64_t random = 1;
  int64_t launches = 0, switches = 0, allocations = 0;
  const std::function<void()>* kernel = nullptr;
  int threads = 0, warps = 0, current = -1, live = 0;
  Warp warp[kMaxThreads / 32];
  Context main, fiber[kMaxThreads];
  char* stacks = nullptr;
  char* shared = nullptr;
  std::exception_ptr error;
  const void* main_stack = nullptr;
  size_t main_size = 0;
  void* fake = nullptr;
} g;

uint64_t next_random() {  // xorshift64*
  g.random ^= g.random >> 12, g.random ^= g.random << 25, g.random ^= g.random >> 27;
  return g.random * 2685821657736338717ull;
}

int bit_at(uint32_t bits, int n) {  // the n-th set bit
  while (n--) bits &= bits - 1;
  return __builtin_ctz(bits);
}

int pick() {  // a runnable thread, or -1
  if (g.order == 0) {
    for (int w = 0; w < g.warps; ++w)
      if (g.warp[w].runnable) return w * 32 + __builtin_ctz(g.warp[w].runnable);
    return -1;
  }
  if (g.order == 1) {
    for (int w = g.warps - 1; w >= 0; --w)
      if (g.warp[w].runnable) return w * 32 + 31 - __builtin_clz(g.warp[w].runnable);
    return -1;
  }
  const int from = int(next_random() % unsigned(g.warps));
  for (int k = 0; k < g.warps; ++k) {
    const int w = (from + k) % g.warps;
    if (uint32_t r = g.warp[w].runnable) return w * 32 + bit_at(r, int(next_random() % unsigned(__builtin_popcount(r))));
  }
  return -1;
}

void place(int thread) {
  g.current = now.thread = thread;
  const unsigned t = unsigned(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

void enter(int thread, Context& from, bool dying) {
  ++g.switches;
  place(thread);
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(dying ? nullptr : &fake, g.stacks + size_t(thread) * kStack, kStack);
  switch_context(from, g.fiber[thread]);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)dying;
  switch_context(from, g.fiber[thread]);
#endif
}

void leave(Context& from, bool dying) {  // to the scheduler's own stack
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(dying ? nullptr : &fake, g.main_stack, g.main_size);
  switch_context(from, g.main);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)dying;
  switch_context(from, g.main);
#endif
}

void yield(bool dying) {
  const int self = g.current;
  const int next = g.error ? -1 : pick();
  if (next == self) return;
  if (next < 0) leave(g.fiber[self], dying);
  else enter(next, g.fiber[self], dying);
  // back on this fiber: whoever switched here has placed it
}

void body() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!g.main_stack) g.main_stack = bottom, g.main_size = size;
#endif
  try {
    (*g.kernel)();
  } catch (...) {
    if (!g.error) g.error = std::current_exception();
  }
  Warp& w = g.warp[g.current / 32];
  w.runnable &= ~(1u << g.current % 32);
  w.finished |= 1u << g.current % 32;
  --g.live;
  yield(true);
  std::abort();
}

const char* name_of(Barrier kind) {
  static const char* names[] = {"nothing", "__syncthreads", "__syncwarp", "a shuffle", "a vote"};
  return names[kind];
}

std::string stuck() {
  std::string s = "threads wait at barriers that the others never reach:";
  for (int w = 0; w < g.warps; ++w) {
    const Warp& x = g.warp[w];
    char line[160];
    std::snprintf(line, sizeof line, " [warp %d: %d at __syncthreads, %d at %s, %d finished]", w,
                  __builtin_popcount(x.at_block), __builtin_popcount(x.waiting), name_of(x.kind),
                  __builtin_popcount(x.finished));
    if (w < 4) s += line;
  }
  return s;
}

void release_block() {
  ++now.block_epoch;
  for (int w = 0; w < g.warps; ++w) g.warp[w].runnable = g.warp[w].at_block, g.warp[w].at_block = 0;
}

uint64_t stamps = 0;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

void run_block(size_t shared_bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, shared_bytes ? shared_bytes : 1)) throw std::bad_alloc();
  std::unique_ptr<void, Free> held(memory);
  std::memset(memory, 0xff, shared_bytes ? shared_bytes : 1);
  g.shared = now.shared = static_cast<char*>(memory), now.shared_bytes = shared_bytes;
  now.block_stamp = ++stamps;
  now.block_epoch = 0;
  std::fill(std::begin(now.warp_epoch), std::end(now.warp_epoch), 0);
  g.live = g.threads;
  g.error = nullptr;
  for (int w = 0; w < g.warps; ++w) {
    g.warp[w] = Warp{};
    g.warp[w].runnable = 0xffffffffu;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(g.stacks, size_t(g.threads) * kStack);  // frames that the last block left behind
#endif
  for (int t = 0; t < g.threads; ++t) g.fiber[t].start(g.stacks + size_t(t) * kStack, body);
  const int first = pick();
  enter(first, g.main, false);
  if (g.error) std::rethrow_exception(g.error);
  if (g.live) throw std::runtime_error("simt: " + stuck());
}

std::mutex one_at_a_time;

// -------------------------------------------------------------------------------------------------------- memory
struct Allocation {
  size_t bytes;
  bool device;
  char* pages;
  size_t mapped;  // without the guard page
  int on;         // the device that was the current one
};
std::map<char*, Allocation> memory;  // by address

const Allocation* holding(const void* p, size_t bytes) {
  char* at = static_cast<char*>(const_cast<void*>(p));
  auto found = memory.upper_bound(at);
  if (found == memory.begin()) return nullptr;
  --found;
  return at + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
}

// Device memory can be touched while this lives: on the device, and in copies.
struct OnDevice {
  static void protect(int how) {
    for (const auto& [at, a] : memory)
      if (a.device && mprotect(a.pages, a.mapped, how)) throw std::runtime_error("simt: mprotect failed");
  }
  OnDevice() { protect(PROT_READ | PROT_WRITE); }
  ~OnDevice() { protect(PROT_NONE); }
};

}  // namespace

void set_order(int order) {
  g.order = order;
  g.random = uint64_t(order) * 0x9e3779b97f4a7c15ull + 1;
}
int64_t launches() { return g.launches; }
int64_t switches() { return g.switches; }
int64_t allocations() { return g.allocations; }
void* shared_memory() { return g.shared; }
int lane() { return g.current % 32; }
void fail(const char* message) { throw std::runtime_error(std::string("simt: ") + message); }

std::string place_of(const void* p) {
  char text[80];
  if (p >= now.shared && p < now.shared + now.shared_bytes) {
    std::snprintf(text, sizeof text, "byte %td of shared memory", static_cast<const char*>(p) - now.shared);
  } else if (const Allocation* a = holding(p, 1)) {
    const char* base = a->pages + a->mapped - (a->bytes + 255) / 256 * 256;
    std::snprintf(text, sizeof text, "byte %td of %zu of %s memory", static_cast<const char*>(p) - base, a->bytes,
                  a->device ? "device" : "pinned");
  } else {
    std::snprintf(text, sizeof text, "memory at %p", p);
  }
  return text;
}
void preempt() { yield(false); }
void stop(const char* why) {
  if (!g.error) g.error = std::make_exception_ptr(std::runtime_error(std::string("simt: ") + why));
  yield(true);
  std::abort();
}

void run(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || threads % 32) fail("a block must have whole warps, up to 1024 threads");
  if (!g.stacks) {
    void* p = mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    g.stacks = now.stacks = static_cast<char*>(p), now.stack_bytes = kStack * kMaxThreads;
  }
  const OnDevice open;
  now.launch = ++g.launches;
  now.launch_stamp = ++stamps;
  g.kernel = &kernel;
  g.threads = int(threads), g.warps = int(threads / 32);
  blockDim = block, gridDim = grid;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  // Order of the blocks: up, down, or a random rotation with a random odd stride's nearest coprime neighbour.
  int64_t step = 1, start = 0;
  if (g.order >= 2 && blocks > 2) {
    start = int64_t(next_random() % uint64_t(blocks));
    step = 1 + int64_t(next_random() % uint64_t(blocks - 1));
    const auto gcd = [](int64_t a, int64_t b) {
      while (b) {
        const int64_t r = a % b;
        a = b, b = r;
      }
      return a;
    };
    while (gcd(step, blocks) != 1) ++step;
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = g.order == 1 ? blocks - 1 - i : (start + i * step) % blocks;
    now.block = b;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  g.kernel = nullptr;
}

void wait(Barrier kind, unsigned mask) {
  const int self = g.current;
  Warp& w = g.warp[self / 32];
  const uint32_t bit = 1u << self % 32;
  if (kind == kBlock) {
    w.runnable &= ~bit;
    w.at_block |= bit;
    int there = 0;
    for (int k = 0; k < g.warps; ++k) there += __builtin_popcount(g.warp[k].at_block);
    if (there == g.threads) release_block();
    yield(false);
    return;
  }
  if (mask != 0xffffffffu) fail("warp operations of this project take the full mask");
  if (w.waiting && w.kind != kind) fail("lanes of one warp meet at different operations");
  w.kind = kind;
  w.waiting |= bit;
  w.runnable &= ~bit;
  if (w.waiting == mask) {
    ++w.generation;
    if (kind == kWarp) ++now.warp_epoch[self / 32];  // shuffles and votes order no memory
    w.runnable = mask;
    w.waiting = 0;
  }
  yield(false);
}

uint64_t exchange(Barrier kind, unsigned mask, uint64_t mine, int source_lane) {
  Warp& w = g.warp[g.current / 32];
  const int parity = w.generation & 1;  // a lane cannot come back to this half before all have left it
  w.slot[parity][g.current % 32] = mine;
  wait(kind, mask);
  return w.slot[parity][source_lane & 31];
}

unsigned ballot(unsigned mask, bool mine) {
  Warp& w = g.warp[g.current / 32];
  const int parity = w.generation & 1;
  w.slot[parity][g.current % 32] = mine;
  wait(kVote, mask);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= unsigned(w.slot[parity][l] & 1) << l;
  return bits;
}

}  // namespace simt

// ------------------------------------------------------------------------------------------------------ misaligned accesses
#if !defined(__SANITIZE_ADDRESS__)
// What g++ -fsanitize=alignment calls where a pointer of some type is used that does not have the type's alignment: on a GPU
// the access would end the launch. As g++ lays out the arguments.
namespace {
struct Misaligned {
  const char* file;
  uint32_t line, column;
  const struct { uint16_t kind, info; char name[1]; } * type;
  unsigned char log_alignment, use;
};
}  // namespace
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(Misaligned* where, void* p) {
  const char* file = std::strrchr(where->file, '/');
  const std::string text = "misaligned use of " + simt::place_of(p) + " as " + where->type->name + ", which needs " +
                           std::to_string(1 << where->log_alignment) + " bytes, at " + (file ? file + 1 : where->file) + ":" +
                           std::to_string(where->line);
  const char* frame = static_cast<const char*>(__builtin_frame_address(0));
  if (frame >= simt::now.stacks && frame < simt::now.stacks + simt::now.stack_bytes) simt::stop(text.c_str());
  std::fprintf(stderr, "simt: %s, in the host's code\n", text.c_str());
  std::abort();
}
#endif

// ------------------------------------------------------------------------------------------------- the runtime's memory
namespace {
cudaError_t allocate(void** p, size_t bytes, bool device) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (bytes + 255) / 256 * 256;
  const size_t mapped = (rounded + page - 1) / page * page;
  ++simt::g.allocations;
  if (!simt::captures.empty()) return simt::refused_in_capture();
  void* pages = mmap(nullptr, mapped + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::memset(pages, 0xff, mapped);
  char* base = static_cast<char*>(pages);
  mprotect(base + mapped, page, PROT_NONE);
  if (device) mprotect(base, mapped, PROT_NONE);
  *p = base + mapped - rounded;
  simt::memory[static_cast<char*>(*p)] = {bytes, device, base, mapped, simt::device};
  simt::contexts[simt::device] = true;
  return cudaSuccess;
}
int device_of(cudaStream_t stream) { return stream ? stream->device : simt::device; }
cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  const auto found = simt::memory.find(static_cast<char*>(p));
  if (found == simt::memory.end()) return cudaErrorInvalidValue;
  munmap(found->second.pages, found->second.mapped + size_t(sysconf(_SC_PAGESIZE)));
  simt::memory.erase(found);
  return cudaSuccess;
}
}  // namespace

cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes, true); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes, false); }
cudaError_t cudaFree(void* p) { return release(p); }
cudaError_t cudaFreeHost(void* p) { return release(p); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  const simt::Allocation* found = simt::holding(p, 1);
  *a = {cudaMemoryTypeUnregistered, simt::device, nullptr, nullptr};
  if (found) a->device = found->on;
  if (found) a->type = found->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost, a->devicePointer = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const bool down = kind == cudaMemcpyHostToDevice;
  const simt::Allocation *there = simt::holding(down ? to : from, bytes), *here = simt::holding(down ? from : to, bytes);
  if (!there || !there->device || (here && here->device)) return cudaErrorInvalidValue;
  if (there->on != device_of(stream)) return cudaErrorInvalidValue;
  const auto copy = [=] {
    const simt::OnDevice open;
    std::memcpy(to, from, bytes);
  };
  // The runtime takes a copy of pageable memory before it returns, and fills it before it returns.
  if (!here) {
    if (const cudaError_t error = simt::finish(stream); error != cudaSuccess) return error;
    copy();
    return cudaSuccess;
  }
  return simt::enqueue(stream, copy);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const simt::Allocation* there = simt::holding(to, bytes);
  if (!there || !there->device || there->on != device_of(stream)) return cudaErrorInvalidValue;
  return simt::enqueue(stream, [=] {
    const simt::OnDevice open;
    std::memset(to, value, bytes);
  });
}
