# SPDX-License-Identifier: Apache-2.0
"""numpy arrays in and out of VTK."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
from vtkmodules.vtkCommonCore import vtkFloatArray, vtkPoints, vtkUnsignedCharArray
from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkImageData, vtkPolyData
from vtkmodules.vtkCommonMath import vtkMatrix4x4
from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper, vtkRenderWindow, vtkTexture

from qdbev_train.synthetic.mesh import Array


def poly_data(
    points: Array, corners: int, colours: NDArray[np.uint8] | None = None, texture: Array | None = None
) -> vtkPolyData:
    """Polygons of `corners` corners each: points (P, 3) in order, colours (P, 3), texture coordinates (P, 2)."""
    poly = vtkPolyData()
    holder = vtkPoints()
    holder.SetData(numpy_to_vtk(np.ascontiguousarray(points, np.float32), deep=True))
    poly.SetPoints(holder)
    cells = vtkCellArray()
    cells.SetData(corners, numpy_to_vtkIdTypeArray(np.arange(len(points), dtype=np.int64), deep=True))
    poly.SetPolys(cells)
    if colours is not None:
        poly.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(colours), deep=True))
    if texture is not None:
        poly.GetPointData().SetTCoords(numpy_to_vtk(np.ascontiguousarray(texture, np.float32), deep=True))
    return poly


def mapper_of(poly: vtkPolyData) -> vtkPolyDataMapper:
    """Draws the polygons with the colours of their points."""
    mapper = vtkPolyDataMapper()
    mapper.SetInputData(poly)
    mapper.SetColorModeToDirectScalars()
    return mapper


def actor_of(mapper: vtkPolyDataMapper, texture: vtkTexture | None = None) -> vtkActor:
    """An actor that shows plain colours, without VTK's lights."""
    actor = vtkActor()
    actor.SetMapper(mapper)
    actor.GetProperty().SetLighting(False)
    if texture is not None:
        actor.SetTexture(texture)
    return actor


def texture_of(image: NDArray[np.uint8], repeat: bool) -> vtkTexture:
    """(H, W, 3) RGB picture, row 0 on top, as a texture with mipmaps."""
    data = vtkImageData()
    data.SetDimensions(image.shape[1], image.shape[0], 1)
    data.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(image[::-1]).reshape(-1, 3), deep=True))
    texture = vtkTexture()
    texture.SetInputData(data)
    texture.SetRepeat(repeat)
    texture.InterpolateOn()
    texture.MipmapOn()
    texture.SetMaximumAnisotropicFiltering(1.0)  # without a graphics card more is dear
    texture.SetColorModeToDirectScalars()
    return texture


def set_matrix(target: vtkMatrix4x4, matrix: Array) -> None:
    target.DeepCopy(matrix.ravel().tolist())


def read_colours(window: vtkRenderWindow, width: int, height: int) -> NDArray[np.uint8]:
    """(H, W, 3) of what the window shows, row 0 on top."""
    data = vtkUnsignedCharArray()
    window.GetPixelData(0, 0, width - 1, height - 1, 0, data, 0)
    return vtk_to_numpy(data).reshape(height, width, 3)[::-1]


def read_depth(window: vtkRenderWindow, width: int, height: int) -> NDArray[np.float32]:
    """(H, W) depth buffer in 0..1, row 0 on top."""
    data = vtkFloatArray()
    window.GetZbufferData(0, 0, width - 1, height - 1, data)
    return vtk_to_numpy(data).reshape(height, width)[::-1]
