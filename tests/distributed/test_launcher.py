"""Where a process finds itself: the variables of each launcher, and what is wrong with those that cannot be true."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmae.errors import InputError
from fastmae.train.distributed.launcher import RankInfo, node_names, read_launcher

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
BATCH = {"SLURM_JOB_ID": "123456", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "16",
         "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NODELIST": "node[001-002]", "SLURM_NNODES": "2"}  # fmt: skip
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NODELIST": "node[001-002]"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}


def test_without_a_launcher_a_run_has_one_process():
    assert read_launcher({"PATH": "/bin", "MASTER_ADDR": "left over"}) == RankInfo()


def test_torchruns_variables_are_taken_as_they_are():
    expected = RankInfo(rank=9, size=16, local_rank=1, local_size=8, address="head", port=1234, launcher="torchrun")
    assert read_launcher(TORCHRUN) == expected
    assert read_launcher({**STEP, **OPEN_MPI, **TORCHRUN}) == expected  # torchrun is started inside steps and jobs


def test_what_a_launcher_does_not_give_of_this_machine_is_left_to_be_counted():
    alone = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    info = read_launcher(alone)
    assert (info.rank, info.size, info.local_rank, info.local_size) == (9, 16, None, None)
    info = read_launcher({**alone, "LOCAL_RANK": "1", "NODE_RANK": "1"})  # Azure ML
    assert (info.local_rank, info.local_size) == (1, None)
    with pytest.raises(InputError, match="LOCAL_RANK=16 must be less than WORLD_SIZE=16"):
        read_launcher({**alone, "LOCAL_RANK": "16"})


def test_deepspeeds_name_of_the_local_size_is_read():
    names = {**without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_SIZE": "8"}
    assert read_launcher(names) == read_launcher(TORCHRUN)
    assert read_launcher({**TORCHRUN, "LOCAL_SIZE": "3"}) == read_launcher(TORCHRUN)  # torchrun inside of it
    with pytest.raises(InputError, match="LOCAL_RANK=1 must be less than LOCAL_SIZE=1"):
        read_launcher({**names, "LOCAL_SIZE": "1"})


@pytest.mark.parametrize("left_over", [{}, {"LOCAL_RANK": "0"}, {"MASTER_ADDR": "node"}])
def test_a_world_size_of_one_alone_is_no_launchers(left_over):
    assert read_launcher({"WORLD_SIZE": "1", **left_over}) == RankInfo()
    assert read_launcher({**STEP, "WORLD_SIZE": "1"}) == read_launcher(STEP)
    assert read_launcher({"RANK": "0", "WORLD_SIZE": "1", **left_over}) == RankInfo(launcher="torchrun")


def test_address_and_port_name_where_they_come_from():
    assert read_launcher(TORCHRUN).source == "MASTER_ADDR and MASTER_PORT"
    assert read_launcher(STEP).source == "SLURM_STEP_NODELIST and SLURM_JOB_ID"
    assert read_launcher({**STEP, "MASTER_ADDR": "ib-head"}).source == "MASTER_ADDR and SLURM_JOB_ID"


def test_the_node_of_each_rank_is_known_under_slurm_unless_ranks_are_dealt_out():
    uneven = {**STEP, "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "4",
              "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-3]"}  # fmt: skip
    assert read_launcher(uneven).hosts == ("n1", "n1", "n2", "n2", "n3")
    assert read_launcher({**uneven, "SLURM_DISTRIBUTION": "block:cyclic"}).hosts == ("n1", "n1", "n2", "n2", "n3")
    assert read_launcher({**uneven, "SLURM_DISTRIBUTION": "cyclic"}).hosts == read_launcher(TORCHRUN).hosts == ()
    assert read_launcher({**uneven, "MASTER_ADDR": "n1", "SLURM_STEP_NODELIST": "n[1-"}).hosts == ()


def test_a_torchrun_of_one_process_needs_no_address():
    assert read_launcher({"RANK": "0", "WORLD_SIZE": "1"}) == RankInfo(launcher="torchrun")


def test_a_task_of_a_slurm_step_meets_the_others_on_the_steps_first_node():
    info = read_launcher(STEP)
    assert (info.rank, info.size, info.local_rank, info.local_size) == (9, 16, 1, 8)
    assert (info.address, info.launcher) == ("node001", "slurm")
    assert 10000 <= info.port < 30000
    assert read_launcher({**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).port == info.port


def test_tasks_may_differ_between_nodes():
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_PROCID": "4",
            "SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "a,b,c"}  # fmt: skip
    assert read_launcher(step).local_size == 1
    assert read_launcher({**step, "SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}).local_size == 2


@pytest.mark.parametrize("shell", [BATCH, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, {"SLURM_JOB_ID": "7", "PMI_RANK": ""}])
def test_a_batch_script_or_salloc_shell_is_a_run_of_one(shell):
    assert read_launcher(shell) == RankInfo()


def test_a_step_on_one_node_needs_no_name_that_resolves():
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "16", "SLURM_STEP_NODELIST": "nowhere"}
    assert read_launcher(step).address == "127.0.0.1"


def test_a_given_address_and_port_win_under_slurm():
    given_ones = {"MASTER_ADDR": "ib-head", "MASTER_PORT": "4321"}
    info = read_launcher({**STEP, **given_ones})
    assert (info.address, info.port) == ("ib-head", 4321)


def test_jobs_and_steps_that_share_a_node_get_ports_of_their_own():
    jobs = range(1234567, 1234567 + 40)
    ports = [
        read_launcher({**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for job in jobs for step in range(8)
    ]
    assert len(set(ports)) == len(ports) and min(ports) >= 10000 and max(ports) < 30000


@pytest.mark.parametrize("mpi", [OPEN_MPI, {**OPEN_MPI, "PMIX_RANK": "3"}, HYDRA, {"PMI_RANK": "3"}])
@pytest.mark.parametrize("around", [{}, BATCH, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_processes_of_a_bare_mpirun_are_told_to_use_torchrun(around, mpi):
    """Also where mpirun has started its daemons through srun, whose step is then not that of the processes."""
    with pytest.raises(InputError, match=r"_SIZE=4?: mpirun .*start the run with torchrun"):
        read_launcher({**around, **mpi})


@pytest.mark.parametrize("around", [{}, BATCH])
def test_a_process_that_only_pmix_describes_is_told_so_too(around):
    with pytest.raises(InputError, match=r"PMIX_RANK=0: mpirun .*start the run with torchrun"):
        read_launcher({**around, "PMIX_RANK": "0", "PMIX_NAMESPACE": "prte-1"})


def test_a_world_of_one_by_mpirun_is_a_run_of_one():
    assert read_launcher({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}) == RankInfo()


@pytest.mark.parametrize("plugin", [{"PMI_RANK": "9", "PMI_SIZE": "16"}, {"PMIX_RANK": "9", "PMIX_NAMESPACE": "slurm.pmix.7"}])
def test_srun_with_a_pmi_plugin_is_still_slurm(plugin):
    assert read_launcher({**STEP, **plugin}) == read_launcher(STEP)


def test_torchruns_agent_and_its_store_are_known_by_its_variables():
    agent = read_launcher({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (agent.is_elastic, agent.has_agent_store) == (True, True)
    static = read_launcher({**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert (static.is_elastic, static.has_agent_store) == (True, False)
    operator = read_launcher(TORCHRUN)
    assert (operator.is_elastic, operator.has_agent_store) == (False, False)


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


HALVES = [
    *((TORCHRUN, name) for name in TORCHRUN if name != "LOCAL_WORLD_SIZE"),
    *((STEP, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")),
]


@pytest.mark.parametrize(("environment", "name"), HALVES)
def test_a_missing_variable_is_named(environment, name):
    with pytest.raises(InputError, match=rf"^{name} is not set"):
        read_launcher(without(environment, name))


NUMBERS = [
    *((TORCHRUN, name) for name in TORCHRUN if name != "MASTER_ADDR"),
    *((STEP, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_JOB_ID")),
]


@pytest.mark.parametrize("value", ["-1", "two", "1.0", " 1", "+1", "٣", "1_0", "9" * 5000])
@pytest.mark.parametrize(("environment", "name"), NUMBERS)
def test_what_is_no_number_is_named(environment, name, value):
    with pytest.raises(InputError, match=name):
        read_launcher({**environment, name: value})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "RANK": "16"}, "RANK=16 must be less than WORLD_SIZE=16"),
        ({**TORCHRUN, "LOCAL_RANK": "8"}, "LOCAL_RANK=8 must be less than LOCAL_WORLD_SIZE=8"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "17"}, "LOCAL_WORLD_SIZE=17 must not exceed WORLD_SIZE=16"),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 must be less than WORLD_SIZE=0"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT must be between 1 and 65535, got 0"),
        ({**STEP, "MASTER_PORT": "65536"}, "MASTER_PORT must be between 1 and 65535, got 65536"),
        ({**STEP, "SLURM_PROCID": "16"}, "SLURM_PROCID=16 must be less than SLURM_STEP_NUM_TASKS=16"),
        ({**STEP, "SLURM_LOCALID": "8"}, "SLURM_LOCALID=8 must be less than SLURM_STEP_TASKS_PER_NODE=8"),
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "8(x3)"},
            r"SLURM_STEP_TASKS_PER_NODE=8\(x3\) does not fit SLURM_STEP_NUM_TASKS=16",
        ),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8x2"}, "SLURM_STEP_TASKS_PER_NODE looks like"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x99999999)"}, "SLURM_STEP_TASKS_PER_NODE has at most"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "9,7", "SLURM_NODEID": "2"}, "SLURM_NODEID=2"),
        ({**STEP, "SLURM_STEP_NODELIST": "node[1-"}, "SLURM_STEP_NODELIST: a list of nodes looks like"),
    ],
)
def test_what_cannot_be_true_is_named(environment, message):
    with pytest.raises(InputError, match=message):
        read_launcher(environment)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node", ["node"]),
        ("node[001-003,007],gpu5", ["node001", "node002", "node003", "node007", "gpu5"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
        ("[3,1].cluster", ["3.cluster", "1.cluster"]),
    ],
)
def test_node_lists_in_slurms_form(text, names):
    assert node_names(text) == names


@pytest.mark.parametrize("text", ["", ",", "a,", "a,,b", "n[1-2", "n1-2]", "n[]", "n[1-]", "n[a-b]", "n[[1]]", "n[2-1]",
                                  "n[1-2-3]", "n 1", "n[1-99999999]", "n[1-999][1-999]", f"n[1-{'9' * 5000}]"])  # fmt: skip
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(InputError, match="node"):
        node_names(text)


WORD = st.text("abcxyz-.0123456789", min_size=1, max_size=6)
WIDTH = st.integers(1, 4)
RANGES = st.tuples(WIDTH, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 12)), min_size=1, max_size=3))


@given(st.lists(st.tuples(WORD, st.lists(st.tuples(RANGES, st.text("ab-.", max_size=3)), max_size=2)), min_size=1, max_size=4))
def test_a_node_list_stands_for_the_names_it_was_made_of(entries):
    """A list is written from numbers, and the names from the same numbers, by the shortest way."""
    texts, expected = [], []
    for word, brackets in entries:
        text, choices = word, [[word]]
        for (width, ranges), tail in brackets:
            items = [f"{low:0{width}}" + (f"-{low + more:0{width}}" if more else "") for low, more in ranges]
            text += f"[{','.join(items)}]{tail}"
            # Slurm pads to the width of the range's first number.
            choices += [[f"{n:0{width}}" for low, more in ranges for n in range(low, low + more + 1)], [tail]]
        texts.append(text)
        expected += ["".join(parts) for parts in itertools.product(*choices)]
    assert node_names(",".join(texts)) == expected


@given(st.text("n0123456789-,[]", max_size=20))
def test_any_text_is_a_node_list_or_an_input_error(text):
    try:
        names = node_names(text)
    except InputError:
        return
    assert names and not any(set(name) & set(",[]") for name in names)
