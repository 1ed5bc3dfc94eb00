// The entry of a merge across ranks, for torch/ alone: what is wrong with a call RankMerge has said
// (distributed.py), and what ranks hold in each other's memory may change with the library.
#pragma once

#include <cstddef>

#include "core/ranks_arguments.h"

extern "C" MERGE_ATTN_STATES_API merge_attn_states_status merge_attn_states_merge_ranks(
    const merge_attn_states::RanksArguments* args, char* message, size_t message_size) noexcept;
