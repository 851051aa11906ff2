"""Whatever JSON arrives, the answer is a head or a problem of the documented kind, never a server error."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.live import Live
from text2weight.artifact import read_head

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner), max_leaves=8
)
NAMES = st.lists(st.text(max_size=12) | SCALARS, max_size=6)
BODIES = ANYTHING | st.fixed_dictionaries(
    {"classes": NAMES | ANYTHING},
    optional={
        "seed": st.integers() | ANYTHING,
        "steps": st.integers(-2, 5) | ANYTHING,
        "sampler": st.sampled_from(["mean", "ddpm", "ddim", "dpmpp_2m"]) | ANYTHING,
    },
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=BODIES)
def test_any_json(shared_live: Live, body: object) -> None:
    content = json.dumps(body).encode()
    response = shared_live.client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    if response.status_code == 200:
        assert len(read_head(response.content).classes) >= 2
    else:
        assert response.status_code == 422, response.text
        assert response.json()["detail"]
