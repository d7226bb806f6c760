import pytest

from fitune.allocator.config import AllocatorConfig, parse_allocator_config
from fitune.errors import UsageError
from fitune.units import MIB


def divisions(text: str) -> tuple[int, ...]:
    return parse_allocator_config(f"roundup_power2_divisions:{text}").roundup_divisions


def test_nothing_gives_the_defaults() -> None:
    assert parse_allocator_config("") == AllocatorConfig()


def test_spaces_and_a_trailing_comma_are_ignored() -> None:
    config = parse_allocator_config(" max_split_size_mb : 64 , expandable_segments:True, ")
    assert config == AllocatorConfig(max_split_bytes=64 * MIB, expandable_segments=True)


def test_the_non_split_rounding_follows_the_large_segment() -> None:
    assert (
        parse_allocator_config("large_segment_size_mb:64").max_non_split_rounding_bytes == 64 * MIB
    )


def test_one_number_of_divisions_holds_for_all_sizes() -> None:
    assert divisions("4") == (4,) * 16


def test_a_list_of_divisions_starts_below_its_first_key_and_ends_with_the_rest() -> None:
    assert divisions("[4:2,16:8,>:1]") == (2, 2, 2, 0, 8, *(1,) * 11)


def test_a_list_of_only_the_rest_leaves_the_first_interval_alone() -> None:
    assert divisions("[>:4]") == (0, *(4,) * 15)


def test_a_key_above_the_last_interval_counts_as_the_last() -> None:
    assert divisions("[262144:4]") == (4,) * 16


def test_settings_of_host_memory_change_nothing() -> None:
    text = "backend:native,pinned_use_background_threads:True,pinned_num_register_threads:8"
    assert parse_allocator_config(text) == AllocatorConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size:64", "did you mean max_split_size_mb?"),
        ("foo:1", "unknown allocator setting 'foo': known are backend"),
        ("max_split_size_mb=64", "has no value; write key:value"),
        ("max_split_size_mb", "has no value"),
        ("max_split_size_mb:", "has no value"),
        ("max_split_size_mb:64,,expandable_segments:True", "'' has no value"),
        ("max_split_size_mb:64,max_split_size_mb:32", "is given twice"),
        ("max_split_size_mb:64.5", "'64.5' where a whole number"),
        ("max_split_size_mb:-1", "'-1' where a whole number"),
        ("max_split_size_mb:19", "is 19, but must be at least 20"),
        ("max_split_size_mb:30,large_segment_size_mb:64", "is 30, but must be at least 64"),
        ("max_non_split_rounding_mb:19", "is 19, but must be at least 20"),
        ("large_segment_size_mb:10", "is 10, but must be at least 11"),
        ("garbage_collection_threshold:0", "must lie between 0 and 1"),
        ("garbage_collection_threshold:1", "must lie between 0 and 1"),
        ("garbage_collection_threshold:high", "'high', which is not a number"),
        ("garbage_collection_threshold:nan", "must lie between 0 and 1"),
        ("per_process_memory_fraction:1.1", "must be from 0 to 1"),
        ("roundup_power2_divisions:0", "must be a power of two"),
        ("roundup_power2_divisions:3", "must be a power of two"),
        ("roundup_power2_divisions:[4:3]", "has 3 divisions"),
        ("roundup_power2_divisions:[3:4]", "has the size 3 MiB"),
        ("roundup_power2_divisions:[4:2", "no closing bracket"),
        ("roundup_power2_divisions:[4]", "'' where a whole number"),
        ("expandable_segments:true", "must be True or False"),
        ("pinned_use_background_threads:yes", "must be True or False"),
        ("pinned_num_register_threads:many", "'many' where a whole number"),
        ("backend:cudaMallocAsync", "cannot be predicted"),
        ("throw_on_cudamalloc_oom:True", "is not modelled"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_allocator_config(text)
    assert message in str(caught.value)
