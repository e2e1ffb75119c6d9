#include "csrc/policy/records.h"

namespace cachedattn {

Conversation Records::Take() {
  if (free_ == kNoConversation) {
    CA_CHECK(end_ < kNoConversation);
    if (end_ % kChunk == 0) chunks_.push_back(std::make_unique<Record[]>(kChunk));
    return end_++;
  }
  const Conversation id = free_;
  free_ = (*this)[id].links[0].next;
  (*this)[id] = Record();
  return id;
}

void Records::Free(Conversation id) {
  (*this)[id] = Record();
  (*this)[id].links[0].next = free_;
  free_ = id;
}

void RecordList::PushBack(Records* records, uint32_t which, Conversation id) {
  (*records)[id].links[which] = {tail, kNoConversation};
  if (empty()) {
    head = id;
  } else {
    (*records)[tail].links[which].next = id;
  }
  tail = id;
}

void RecordList::Erase(Records* records, uint32_t which, Conversation id) {
  const Link link = (*records)[id].links[which];
  if (head == id) {
    head = link.next;
    if (head == kNoConversation) tail = kNoConversation;
    return;
  }
  (*records)[link.prev].links[which].next = link.next;
  if (link.next == kNoConversation) {
    tail = link.prev;
  } else {
    (*records)[link.next].links[which].prev = link.prev;
  }
}

size_t Names::BucketOf(uint64_t name, uint32_t tenant) const {
  uint64_t hash = name + 0x9e3779b97f4a7c15 * (tenant + uint64_t{1});
  hash = (hash ^ (hash >> 32)) * 0xd6e8feb86659fd93;
  hash = (hash ^ (hash >> 32)) * 0xd6e8feb86659fd93;
  hash ^= hash >> 32;
  const uint64_t wide = hash & (2 * mask_ + 1);
  return wide < buckets_.size() ? wide : hash & mask_;
}

Conversation Names::Find(uint64_t name, uint32_t tenant) const {
  Conversation id = buckets_[BucketOf(name, tenant)];
  while (id != kNoConversation) {
    const Record& record = (*records_)[id];
    if (record.name == name && record.tenant == tenant) break;
    id = record.next_of_name;
  }
  return id;
}

void Names::Insert(Conversation id) {
  const auto push = [this](Conversation named) {
    Record& record = (*records_)[named];
    Conversation& bucket = buckets_[BucketOf(record)];
    record.next_of_name = bucket;
    bucket = named;
  };
  push(id);
  if (++size_ <= buckets_.size()) return;
  // The next bucket in turn shares its members with a new one at the end.
  if (buckets_.size() > 2 * mask_ + 1) mask_ = 2 * mask_ + 1;
  Conversation moving = buckets_[buckets_.size() & mask_];
  buckets_[buckets_.size() & mask_] = kNoConversation;
  buckets_.push_back(kNoConversation);
  while (moving != kNoConversation) {
    const Conversation next = (*records_)[moving].next_of_name;
    push(moving);
    moving = next;
  }
}

void Names::Erase(Conversation id) {
  Conversation* link = &buckets_[BucketOf((*records_)[id])];
  while (*link != id) {
    CA_CHECK(*link != kNoConversation);
    link = &(*records_)[*link].next_of_name;
  }
  *link = (*records_)[id].next_of_name;
  --size_;
}

}  // namespace cachedattn
