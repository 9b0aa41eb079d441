// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import (
	"net/http"

	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// spliceBody does nothing here: the caller copies the body.
func spliceBody(http.ResponseWriter, *origin.ResponseBody, func(int64)) (done bool, err error) {
	return false, nil
}
