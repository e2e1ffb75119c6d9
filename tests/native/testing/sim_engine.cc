// The I/O engine of SimDisk: when and how the bytes of a request move.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "tests/native/testing/sim_disk.h"

namespace cachedattn {

SimEngine::SimEngine(SimDisk* disk, uint32_t depth) : disk_(disk), depth_(depth) {
  active_.reserve(depth);
  disk_->engines_.push_back(this);
}

// What is in flight belongs to the disk until it is done.
SimEngine::~SimEngine() {
  IoCompletion ignored[1];
  while (in_flight() > 0) Poll(ignored, 1'000'000);
  std::erase(disk_->engines_, this);
}

void SimEngine::Submit(const IoRequest& request) {
  CA_CHECK(in_flight() < depth_);
  Active active;
  active.request = request;
  active.operation = disk_->num_requests_ + 1;
  if (request.op != IoOp::kSync) {
    CA_CHECK(request.offset % kPage == 0 && request.size % kPage == 0 && request.size > 0);
    CA_CHECK(reinterpret_cast<uintptr_t>(request.data) % kPage == 0);
  }
  Plan(&active);
  if (active.first_ns <= disk_->clock_->NowNs() && active.cut > 0) {
    Move(active, 0, active.cut);
    active.moved = active.cut;
  }
  active_.push_back(active);
}

void SimEngine::Plan(Active* active) {
  const IoRequest& request = active->request;
  SimRandom& random = disk_->random_;
  const int64_t now = disk_->clock_->NowNs();
  if (!dead_) active->fault = disk_->Choose(request.op);
  active->place = request.op == IoOp::kSync ? disk_->num_finished_ : request.offset;
  active->result = static_cast<int32_t>(request.op == IoOp::kSync ? 0 : request.size);
  // From 1 us to 1 ms.
  int64_t takes = static_cast<int64_t>(random.Scale(10)) * 1000;
  if (active->fault == DiskFault::kHang) {
    takes = disk_->faults_.hang_ns * (100 + random.Below(300)) / (random.OneIn(4) ? 1 : 100);
  }
  active->end_ns = now + takes;
  if (dead_) {
    active->end_ns = now;
    active->result = -EIO;
    return;
  }
  PlanWay(active);
  if (active->fault != DiskFault::kNone && active->fault != DiskFault::kStaleRead) {
    disk_->Count(active->fault);
  }
  const uint32_t pages = active->moves / kPage;
  const bool whole = active->fault == DiskFault::kTornWrite ||
                     active->fault == DiskFault::kStaleRead || pages < 2 || random.OneIn(2);
  if (whole) return;
  active->cut = (1 + random.Below(pages - 1)) * kPage;
  active->first_ns = now + takes * random.Below(4) / 4;
}

// How much moves from or to where, and what the completion says. A fault that cannot be is none.
void SimEngine::PlanWay(Active* active) {
  const IoRequest& request = active->request;
  SimRandom& random = disk_->random_;
  const bool whole = !disk_->hostile_ && request.op == IoOp::kWrite;
  active->moves = request.op == IoOp::kSync ? 0 : request.size;
  switch (active->fault) {
    case DiskFault::kEio:
    case DiskFault::kNoSpace:
      active->result = active->fault == DiskFault::kEio ? -EIO : -ENOSPC;
      active->moves = whole ? random.Below(2) * active->moves
                            : random.Below(active->moves / kDiskSector + 1) * kDiskSector;
      break;
    case DiskFault::kAgain:
      active->result = -EAGAIN;
      active->moves = 0;
      break;
    case DiskFault::kShort:
      active->result = static_cast<int32_t>(random.Below(request.size / kDiskSector) * kDiskSector);
      active->moves = whole ? random.Below(2) * request.size : active->result;
      break;
    case DiskFault::kRot:
      disk_->Flip(disk_->medium_ + request.offset, request.size);
      disk_->MarkDirty(request.offset, request.size);
      break;
    case DiskFault::kLostWrite:
      active->moves = 0;
      break;
    case DiskFault::kMisdirectedRead:
    case DiskFault::kMisdirectedWrite: {
      const int64_t away = (random.Below(2) ? 1 : -1) * (1 + static_cast<int64_t>(random.Below(3)));
      const int64_t place =
          static_cast<int64_t>(request.offset) + away * static_cast<int64_t>(disk_->faults_.stride);
      if (place < 0 || static_cast<uint64_t>(place) + request.size > disk_->size_) {
        active->fault = DiskFault::kNone;
      } else {
        active->place = static_cast<uint64_t>(place);
      }
      break;
    }
    default:
      break;
  }
  if (request.op == IoOp::kRead && active->place + active->moves > disk_->size_) {  // the end
    active->moves = static_cast<uint32_t>(disk_->size_ - std::min(active->place, disk_->size_));
    active->result = std::min(active->result, static_cast<int32_t>(active->moves));
  }
}

void SimEngine::Move(const Active& active, uint32_t begin, uint32_t end) {
  if (dead_ || begin >= end) return;
  std::byte* const data = active.request.data + begin;
  if (active.request.op == IoOp::kRead) {
    std::memcpy(data, disk_->medium_ + active.place + begin, end - begin);
  } else {
    disk_->Store(active.operation, active.place + begin, data, end - begin);
  }
}

void SimEngine::MoveSectors(const Active& active) {
  for (uint32_t at = 0; at < active.moves; at += kDiskSector) {
    if (disk_->random_.OneIn(2)) Move(active, at, at + kDiskSector);
  }
}

int32_t SimEngine::Finish(const Active& active) {
  if (active.fault == DiskFault::kTornWrite) {
    MoveSectors(active);
  } else {
    Move(active, active.moved, active.moves);
  }
  if (dead_) return -EIO;
  const IoRequest& request = active.request;
  if (request.op == IoOp::kWrite) disk_->FinishWrite(active.operation);
  if (request.op == IoOp::kSync && active.result == 0) disk_->Sync(active.place);
  if (active.fault == DiskFault::kFlip) disk_->Flip(request.data, request.size);
  if (active.fault == DiskFault::kStaleRead &&
      disk_->ReadStale(request.offset, request.data, request.size)) {
    disk_->Count(DiskFault::kStaleRead);
  }
  return active.result;
}

// The power is gone. An honest disk finishes the writes that it has begun; the crash then keeps
// or loses them whole.
void SimEngine::Die() {
  for (Active& active : active_) {
    if (active.request.op == IoOp::kWrite && !disk_->hostile_) {
      Move(active, active.moved, active.moves);
    }
    active.end_ns = disk_->clock_->NowNs();
  }
  dead_ = true;
}

size_t SimEngine::Poll(std::span<IoCompletion> out, int64_t timeout_us) {
  SimClock& clock = *disk_->clock_;
  if (active_.empty() || out.empty()) return 0;
  clock.Advance(1 + disk_->random_.Below(8000));  // looking takes time too
  const int64_t give_up = clock.NowNs() + timeout_us * 1000;
  while (true) {
    const size_t count = Collect(out);
    if (count > 0 || clock.NowNs() >= give_up) return count;
    int64_t next = give_up;
    for (const Active& active : active_) next = std::min(next, active.end_ns);
    clock.AdvanceTo(next);
  }
}

size_t SimEngine::Collect(std::span<IoCompletion> out) {
  const int64_t now = disk_->clock_->NowNs();
  size_t count = 0;
  for (size_t i = 0; i < active_.size();) {
    Active& active = active_[i];
    if (active.cut > active.moved && now >= active.first_ns) {
      Move(active, 0, active.cut);
      active.moved = active.cut;
    }
    if (now < active.end_ns || count == out.size()) {
      ++i;
      continue;
    }
    const int32_t result = Finish(active);
    out[count++] = {active.request.tag, result};
    active = active_.back();
    active_.pop_back();
  }
  return count;
}

}  // namespace cachedattn
