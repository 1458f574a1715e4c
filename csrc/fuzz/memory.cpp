#include "memory.h"

#include <malloc.h>

#include <cstdlib>
#include <new>

namespace {

bool metering = false;
long long live = 0;
long long peak_live = 0;

void* allocate(std::size_t bytes) noexcept {
  void* memory = std::malloc(bytes > 0 ? bytes : 1);
  if (metering && memory != nullptr) {
    live += static_cast<long long>(malloc_usable_size(memory));
    if (live > peak_live) peak_live = live;
  }
  return memory;
}

void* allocate_or_throw(std::size_t bytes) {
  void* memory = allocate(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void release(void* memory) noexcept {
  if (metering && memory != nullptr) live -= static_cast<long long>(malloc_usable_size(memory));
  std::free(memory);
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t& none) noexcept {
  return operator new(bytes, none);
}
void operator delete(void* memory) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }

namespace rle::fuzz {

Meter::Meter() {
  live = 0;
  peak_live = 0;
  metering = true;
}

Meter::~Meter() { metering = false; }

u64 Meter::peak() const { return static_cast<u64>(peak_live); }

}  // namespace rle::fuzz
