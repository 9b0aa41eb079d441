# Prints Caddy's access log and the proxy's tunnels, as JSON lines in one file, in Squid's native
# format: jq -rf native.jq /var/log/caddy/proxy.log
# A query may hold secrets; as in Squid's log, only its "?" remains.
def pad(width): tostring | (" " * ([width - length, 0] | max) // "") + .;

def milliseconds: . * 1000 | floor;

def seconds: milliseconds | tostring | .[:-3] + "." + .[-3:];

# Squid writes a space in a field as an escape. A "-" stands for nothing.
def field: if . == null or . == "" then "-" else gsub("[ \\t\\r\\n]"; "%20") end;

def line(client; code; bytes; method; url; user; route; type):
  "\(.ts | seconds) \(.duration | milliseconds | pad(6)) \(client) \(code) \(bytes) \(method | field) \(url | field) \(user | field) \(route) \(type | field)";

if .msg == "CONNECT tunnel closed" then
  line(.client; "TCP_TUNNEL/200"; .bytes_down; "CONNECT"; .target; .user; "HIER_DIRECT/-"; "-")
elif .msg == "handled request" and (.request.method != "CONNECT" or .status != 200) then
  (.resp_headers["Proxy-Status"][0] // "") as $own
  | line(.request.client_ip;
      (if $own == "" then "TCP_MISS" elif .status < 500 then "TCP_DENIED" else "TCP_MISS" end) + "/\(.status | if . < 100 then "000" else tostring end)";
      .size; .request.method; (.request.uri | sub("\\?.*"; "?")); .user_id;
      (if $own == "" then "HIER_DIRECT/-" else "HIER_NONE/-" end);
      (.resp_headers["Content-Type"][0] // "" | split(";")[0]))
else empty end
