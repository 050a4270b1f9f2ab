// Memory that a thread keeps from call to call.

#pragma once

#include <cstdint>
#include <memory>

#include "lanes.h"

// Room for `size` values, as they are left: one block a thread and SLOT, kept for the next call.
// Whole lines of the cache, which wide vectors would else be cut by.
template <class T, int SLOT> static T* room(Int size) {
  static thread_local std::unique_ptr<T[]> held;
  static thread_local Int held_size = 0;
  const Int line = 64 / sizeof(T);
  if (held_size < size) {
    held.reset(new T[size + line]);
    held_size = size;
  }
  const auto place = reinterpret_cast<std::uintptr_t>(held.get());
  return held.get() + (64 - place % 64) % 64 / sizeof(T);
}
