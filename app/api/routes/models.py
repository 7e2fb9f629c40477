"""Routes of /v1/models.

Knows requests and replies; must not know SQL or model servers.
"""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.http.auth import AnyCaller, ModelsWriter
from app.api.http.paging import page
from app.api.http.path_params import ModelName
from app.api.http.resources import DeskDep
from app.api.schemas.files import deleted_to_wire
from app.api.schemas.models import item_to_wire
from app.core import models

router = APIRouter(prefix="/v1/models")


@router.get("")
def list_models(caller: AnyCaller, desk: DeskDep) -> Response:
    """Every base and every model of the project, in one page: the SDK never asks for a second."""
    with desk.database.reading() as session:
        found = models.list_models(session, caller.project_id)
        items = [item_to_wire(item, *models.get_origin(session, item), org_id=caller.org.id) for item in found]
    return JSONResponse(page(items, has_more=False))


@router.get("/{name}")
def get_model(name: ModelName, caller: AnyCaller, desk: DeskDep) -> Response:
    """One base or model."""
    with desk.database.reading() as session:
        item = models.get_model(session, caller.project_id, name)
        body = item_to_wire(item, *models.get_origin(session, item), org_id=caller.org.id)
    return JSONResponse(body)


@router.delete("/{name}")
def delete_model(name: ModelName, caller: ModelsWriter, desk: DeskDep) -> Response:
    """Take a model out of service; running requests finish."""
    with desk.database.writing() as session:
        model = models.delete_model(session, caller.project_id, name)
        session.commit()
    return JSONResponse(deleted_to_wire("model", model.id))
