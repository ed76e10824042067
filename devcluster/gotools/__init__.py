"""Programs written in Go that the development cluster runs, pinned by go.mod and go.sum files beside this one."""
