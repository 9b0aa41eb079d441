// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net/http"

// splice does nothing here: the caller copies the body.
func (b *originBody) splice(http.ResponseWriter, func(int64)) (done bool, err error) {
	return false, nil
}
