#!/bin/sh
# Keys for a trial on one machine: an authority, the server's certificate, one key for each node.
# usage: certificates.sh FOLDER NODES [HOST]
set -eu
umask 077
folder=$1 nodes=$2 host=${3:-localhost}
mkdir -p "$folder"
cd "$folder"

openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -sha256 -days 365 -subj "/CN=fedlscl trial authority" -out ca.crt
openssl ecparam -name prime256v1 -genkey -noout -out server.key
openssl req -new -key server.key -subj "/CN=$host" -out server.csr
printf 'subjectAltName=DNS:%s,DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n' "$host" >server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 365 \
    -extfile server.ext -out server.crt 2>/dev/null
rm -f server.csr server.ext

node=0
while [ "$node" -lt "$nodes" ]; do
    rm -f "node$node" "node$node.pub"
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "node$node" -f "node$node"
    node=$((node + 1))
done
