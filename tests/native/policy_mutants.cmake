# Bugs in the placement policy (see mutants.cmake and store_mutants.cmake).

store_mutant(exposure_of_idle_ones_left_out policy/hazard.cc policy_random_test *
  [=[static_cast<double>(at.exposure_ns + running)]=]
  [=[static_cast<double>(at.exposure_ns + 0 * running)]=])
store_mutant(queue_goes_from_its_head policy/policy_order.cc policy_random_test *
  [=[return ~record.queued;]=]
  [=[return record.queued;]=])
store_mutant(return_at_no_age policy/policy_learn.cc policy_random_test *
  [=[AddEvent(record.turn_class, HazardTables::BinOf(age_ns));]=]
  [=[AddEvent(record.turn_class, HazardTables::BinOf(age_ns / 2));]=])
store_mutant(nearest_end_is_best policy/hazard.cc hazard_test *
  [=[while (size_ > 0 && first.ratio()]=]
  [=[while (size_ > 2 * HazardTables::kNumBins - 2 && first.ratio()]=])
store_mutant(strays_forgotten policy/ranking.cc policy_random_test *
  [=[if (at.num_strays == 0) return at.list.head;]=]
  [=[if (!at.list.empty()) return at.list.head;]=])
