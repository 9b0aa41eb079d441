// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"reflect"
	"testing"
)

func TestSetWindows(t *testing.T) {
	for name, row := range map[string]struct{ config, want *http.HTTP2Config }{
		"Caddy's":        {nil, &http.HTTP2Config{MaxReceiveBufferPerConnection: clientConnWindow, MaxReceiveBufferPerStream: clientStreamWindow}},
		"other options":  {&http.HTTP2Config{MaxReadFrameSize: 1 << 15}, &http.HTTP2Config{MaxReadFrameSize: 1 << 15, MaxReceiveBufferPerConnection: clientConnWindow, MaxReceiveBufferPerStream: clientStreamWindow}},
		"the operator's": {&http.HTTP2Config{MaxReceiveBufferPerStream: 1 << 17}, &http.HTTP2Config{MaxReceiveBufferPerStream: 1 << 17}},
	} {
		t.Run(name, func(t *testing.T) {
			server := &http.Server{HTTP2: row.config}
			if setWindows(server); !reflect.DeepEqual(server.HTTP2, row.want) {
				t.Errorf("windows %+v, want %+v", server.HTTP2, row.want)
			}
		})
	}
}
