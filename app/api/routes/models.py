"""Routes of /v1/models."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.http.auth import AnyCaller, ModelsWriter
from app.api.http.paging import page
from app.api.http.path_params import ModelName
from app.api.http.resources import ResourcesDep
from app.api.schemas.files import deletion_to_body
from app.api.schemas.models import item_to_body
from app.core import models

router = APIRouter(prefix="/v1/models")


@router.get("")
def list_models(caller: AnyCaller, resources: ResourcesDep) -> Response:
    """Every base and every model of the project, in one page: the SDK never asks for a second."""
    with resources.database.reading() as session:
        found = models.list_models(session, caller.project_id)
        items = [item_to_body(item, *models.get_origin(session, item), org_id=caller.org.id) for item in found]
    return JSONResponse(page(items, has_more=False))


@router.get("/{name}")
def get_model(name: ModelName, caller: AnyCaller, resources: ResourcesDep) -> Response:
    """One base or model."""
    with resources.database.reading() as session:
        item = models.get_model(session, caller.project_id, name)
        body = item_to_body(item, *models.get_origin(session, item), org_id=caller.org.id)
    return JSONResponse(body)


@router.delete("/{name}")
def delete_model(name: ModelName, caller: ModelsWriter, resources: ResourcesDep) -> Response:
    """Take a model out of service; running requests finish."""
    with resources.database.writing() as session:
        model = models.delete_model(session, caller.project_id, name)
        session.commit()
    return JSONResponse(deletion_to_body("model", model.id))
