// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/http"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI serves /async_proxy/ on Caddy's admin endpoint. docs/admin-api.md describes it.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.async_proxy",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes implements caddy.AdminRouter.
func (a adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{Pattern: "/async_proxy/", Handler: caddy.AdminHandlerFunc(a.serve)}}
}

func (adminAPI) serve(w http.ResponseWriter, r *http.Request) error {
	err := program.status.ServeAPI(w, r)
	var failed *status.APIError
	if errors.As(err, &failed) {
		return caddy.APIError{HTTPStatus: failed.Status, Err: failed.Err}
	}
	return err
}

// Interface guard
var _ caddy.AdminRouter = adminAPI{}
