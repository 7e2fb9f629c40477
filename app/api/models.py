"""Routes of /v1/models.

Knows requests and replies; must not know SQL or model servers.
"""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.caller import AnyCaller, ModelsWriter
from app.api.desk import DeskDep
from app.api.paging import page
from app.api.path_ids import ModelName
from app.api.wire.files import deleted_to_wire
from app.api.wire.models import base_to_wire, model_to_wire
from app.core import jobs, models
from app.core.tables import BaseModel, Model

router = APIRouter(prefix="/v1/models")


@router.get("")
def list_models(caller: AnyCaller, desk: DeskDep) -> Response:
    """Every base and every model of the project, in one page: the SDK never asks for a second."""
    with desk.database.reading() as session:
        found = models.list_models(session, caller.project_id)
        alignment_of, base_of = partial(models.get_alignment, session), partial(models.get_base, session)
        job_of = partial(jobs.get_job, session, caller.project_id)
        items = [_to_wire(item, caller.org.id, alignment_of, base_of, job_of) for item in found]
    return JSONResponse(page(items, has_more=False))


@router.get("/{name}")
def get_model(name: ModelName, caller: AnyCaller, desk: DeskDep) -> Response:
    """One base or model."""
    with desk.database.reading() as session:
        item = models.get_model(session, caller.project_id, name)
        alignment_of, base_of = partial(models.get_alignment, session), partial(models.get_base, session)
        job_of = partial(jobs.get_job, session, caller.project_id)
        return JSONResponse(_to_wire(item, caller.org.id, alignment_of, base_of, job_of))


@router.delete("/{name}")
def delete_model(name: ModelName, caller: ModelsWriter, desk: DeskDep) -> Response:
    """Take a model out of service; running requests finish."""
    with desk.database.writing() as session:
        model = models.delete_model(session, caller.project_id, name)
        session.commit()
    return JSONResponse(deleted_to_wire("model", model.id))


def _to_wire(
    item: BaseModel | Model,
    org_id: str,
    alignment_of: Callable[[str], Job | None],
    base_of: Callable[[str], BaseModel],
    job_of: Callable[[str], Job],
) -> dict[str, object]:
    if isinstance(item, BaseModel):
        return base_to_wire(item, alignment_of(item.id))
    return model_to_wire(item, base_of(item.base_id), job_of(item.job_id), org_id=org_id)
